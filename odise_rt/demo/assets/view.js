// ---- one result ------------------------------------------------------------------------------------------------

function unroll({ ids, lengths }, size) {
  const values = new Uint16Array(size);
  let place = 0;
  for (let i = 0; i < ids.length; i += 1) {
    values.fill(ids[i], place, place + lengths[i]);
    place += lengths[i];
  }
  return values;
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
// Colours as canvases keep them, four bytes of a little-endian word.
const word = ([r, g, b], a) => ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;

// Pixels on either side of a border, `thickness` of them.
function borders(owners, width, height, thickness) {
  const edge = new Uint8Array(owners.length);
  for (let y = 0, i = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, i += 1) {
      if (x + 1 < width && owners[i] !== owners[i + 1]) edge[i] = edge[i + 1] = 1;
      if (y + 1 < height && owners[i] !== owners[i + width]) edge[i] = edge[i + width] = 1;
    }
  }
  for (let step = 1; step < thickness; step += 1) {
    const before = edge.slice();
    for (let i = 0; i < edge.length; i += 1) {
      if (before[i]) edge[i - width] = edge[i + width] = edge[i - 1] = edge[i + 1] = 1; // outside: no effect
    }
  }
  return edge;
}

function layer(width, height, className) {
  const canvas = make("canvas", className);
  canvas.width = width;
  canvas.height = height;
  canvas.setAttribute("aria-hidden", "true");
  return canvas;
}

function paint(canvas, colourOf) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const words = new Uint32Array(image.data.buffer);
  for (let i = 0; i < words.length; i += 1) words[i] = colourOf(i);
  context.putImageData(image, 0, 0);
}

let views = [];
let opacity = 0.55;

// The picture itself. Tall ones are held to the window's height by their width.
function makeFrame({ width, height, token }) {
  const frame = make("div", "frame");
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.style.setProperty("--ratio", width / height);
  const photo = make("img", "photo");
  photo.src = address(`pictures/${token}/shown.jpg`);
  photo.draggable = false;
  frame.append(photo);
  return frame;
}

const NOUNS = { panoptic: ["segment", "segments"], semantic: ["class", "classes"], instance: ["object", "objects"] };

function makeView(content, state, index, count) {
  const { width, height } = content.map;
  const owners = unroll(content.map, width * height);
  // Lines of about one and a half pixels of the screen, however much the picture is scaled.
  const room = find(".views").clientWidth || width;
  const thickness = Math.max(1, Math.round((1.2 * width) / (count > 1 ? room / 2 : room)));
  const edge = borders(owners, width, height, thickness);
  const regions = new Map(content.regions.map((region) => [region.id, region]));
  const letter = letters(count, index);

  const section = make("section", "view");
  section.setAttribute("aria-label", letter ? `Result with vocabulary ${letter}` : "Result");
  const frame = makeFrame(state.picture);
  find(".photo", frame).alt = `${state.picture.name}: ${content.regions.map((r) => r.label).join(", ") || "no segment"}`;

  const fill = layer(width, height, "fill");
  const table = new Uint32Array(65536);
  for (const region of content.regions) table[region.id] = word(rgb(region.colour), 255);
  paint(fill, (i) => table[owners[i]]);
  fill.style.opacity = opacity;
  const lines = layer(width, height, "lines");
  const dark = new Uint32Array(65536).fill(word([255, 255, 255], 200));
  for (const region of content.regions) dark[region.id] = word(rgb(region.colour).map((v) => v * 0.55), 255);
  paint(lines, (i) => (edge[i] ? dark[owners[i]] : 0));
  const light = layer(width, height, "light");
  const labels = make("div", "labels");
  labels.setAttribute("aria-hidden", "true");
  const tip = make("div", "tip");
  tip.setAttribute("role", "tooltip");
  tip.hidden = true;
  frame.append(fill, lines, light, labels, tip);

  for (const region of content.regions) {
    if (!region.place) continue;
    const tag = make("span", "label", region.label);
    tag.style.left = `${100 * region.place[0]}%`;
    tag.style.top = `${100 * region.place[1]}%`;
    tag.style.background = region.colour;
    tag.style.color = region.ink;
    tag.dataset.id = region.id;
    labels.append(tag);
  }

  const side = make("div", "side");
  const heading = make("div", "side-heading");
  const [noun, plural] = NOUNS[state.mode];
  const number = content.regions.length;
  const called = number === 1 ? noun : plural;
  heading.append(make("span", "side-title", letter ? `Vocabulary ${letter}` : called));
  const found = noun === "class" ? `${number} of` : `${number} ${called} from`;
  const given = `${content.classes.toLocaleString("en")} ${content.classes === 1 ? "class" : "classes"}`;
  heading.append(make("span", "side-note", `${found} ${given}, ${content.seen.toLocaleString("en")} seen in training`));
  const legend = make("ul", "legend");
  legend.setAttribute("role", "listbox");
  legend.dataset.keys = "ArrowUp ArrowDown";
  legend.setAttribute("aria-label", letter ? `Segments with vocabulary ${letter}` : "Segments");
  const details = make("div", "details");
  details.setAttribute("aria-live", "polite");
  const omitted = make("div", "omitted");
  side.append(heading, legend, omitted, details, makeDownloads(state, index));
  section.append(frame, side);

  const leftOut = new Map();
  for (const { label, step, was } of current.corrections[index]) if (!label) leftOut.set(step, was);
  if (leftOut.size && state.mode !== "semantic") {
    omitted.append(make("span", "", "Left out:"));
    for (const [step, was] of leftOut) {
      const back = makeButton("put-back", was, () => putBack(index, step));
      back.setAttribute("aria-label", `Put ${was} back`);
      back.title = "Put it back";
      omitted.append(back);
    }
  }

  const rows = new Map();
  for (const region of content.regions) {
    const row = make("li", "row");
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", "false");
    row.tabIndex = rows.size ? -1 : 0;
    row.dataset.id = region.id;
    const swatch = make("span", "swatch");
    swatch.style.background = region.colour;
    const name = make("span", "name", region.label);
    const score = make("span", "score", briefly(region));
    const share = make("span", "share", percent(region.share));
    row.append(swatch, name, score, share);
    const scored = region.score === null ? "" : `, ${told(region)}`;
    row.setAttribute("aria-label", `${region.label}${scored}, ${percent(region.share)} of the picture`);
    legend.append(row);
    rows.set(region.id, row);
  }
  const advice = lowered(state.mode) ? "try other words" : "lower the thresholds or try other words";
  if (!number) legend.append(make("li", "none", `No ${noun}: ${advice}.`));

  let pinned = 0;
  let pinnedPlace = null; // where, as shares of width and height
  let pointed = 0;
  let drawn = -1;

  function describe(region) {
    details.replaceChildren();
    if (!region) {
      if (number) details.append(hint("Point at a segment, or choose", "Choose"));
      return;
    }
    const head = make("div", "details-head");
    const swatch = make("span", "swatch");
    swatch.style.background = region.colour;
    head.append(swatch, make("strong", "details-label", region.label));
    if (region.score !== null) head.append(make("span", "details-score", told(region)));
    const facts = [`${region.thing ? "thing" : "stuff"}`, `${percent(region.share)} of the picture`];
    if (region.unknown) facts.push("no word reaches the probability asked for");
    else facts.push(region.seen ? "seen in training" : "not seen in training");
    details.append(head, make("div", "details-facts", facts.join(" · ")));
    if (!region.names.length) {
      const why = "Here every pixel has a class of its own: switch to panoptic or instance for the names of one mask.";
      details.append(make("p", "hint", why));
      return;
    }
    const names = make("table", "names");
    const top = make("tr");
    for (const [title, hint] of [
      ["best names", ""],
      ["both", "Both classifiers together, and “no object”"],
      ["diffusion", "The mask classifier alone, on diffusion features"],
      ["CLIP", "CLIP alone"],
    ]) {
      const cell = make("th", "", title);
      cell.scope = "col";
      cell.title = hint;
      top.append(cell);
    }
    names.append(top);
    for (const candidate of region.names) {
      const line = make("tr");
      const label = make("th", "candidate");
      label.scope = "row";
      label.title = candidate.seen ? "seen in training" : "not seen in training";
      const choice = makeButton("choice", candidate.label, () => rename(region, candidate.label));
      choice.disabled = !region.parts.length;
      choice.setAttribute("aria-pressed", String(candidate.label === region.label));
      label.append(choice);
      line.append(label);
      for (const key of ["score", "mask", "clip"]) {
        const cell = make("td", key);
        const bar = make("span", "bar");
        bar.style.width = `${100 * candidate[key]}%`;
        cell.append(make("span", "value", candidate[key].toFixed(2)), bar);
        line.append(cell);
      }
      names.append(line);
    }
    details.append(names);
    if (region.parts.length) details.append(makeByHand(region));
  }

  // Any other name, and none at all.
  function makeByHand(region) {
    const form = make("form", "by-hand");
    const field = make("input", "other-name");
    field.placeholder = "another name";
    field.setAttribute("aria-label", `Another name for ${region.label}`);
    field.setAttribute("list", `odise-words-${index}`);
    field.maxLength = 200;
    form.append(field, makeButton("leave-out", "Leave out", () => leaveOut(region)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) rename(region, field.value.trim());
    });
    field.addEventListener("keydown", (event) => event.key === "Escape" && rows.get(region.id).focus());
    return form;
  }
  const words = make("datalist");
  words.id = `odise-words-${index}`;
  words.append(...content.words.map((word) => new Option(word)));
  section.append(words);

  // A segment is corrected at a place in each part of it: its number changes with the thresholds, the place does not.
  function replacing(region) {
    const places = region.parts.slice();
    places.was = region.label;
    places.replaced = ({ x, y, label }) => label && view.at(x, y) === region.id;
    return places;
  }
  function rename(region, label) {
    if (region.parts.length) correct(index, replacing(region), label);
  }
  function leaveOut(region) {
    if (region.parts.length) correct(index, replacing(region), "");
  }

  function draw() {
    const id = pointed || pinned;
    if (id === drawn || details.querySelector(":focus-visible")) return; // what one types in stays
    drawn = id;
    const region = regions.get(id);
    for (const [key, row] of rows) row.classList.toggle("active", key === id);
    section.classList.toggle("picking", Boolean(region));
    for (const tag of labels.children) tag.classList.toggle("active", Number(tag.dataset.id) === id);
    const context = light.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (region) {
      const inside = region.mask ? unroll(region.mask, width * height) : owners.map((owner) => (owner === id ? 1 : 0));
      const rim = borders(inside, width, height, thickness + 1);
      const shade = word([0, 0, 0], 120);
      const white = word([255, 255, 255], 255);
      paint(light, (i) => (rim[i] ? white : inside[i] ? 0 : shade));
    }
    describe(region);
  }

  const view = {
    section,
    fill,
    labels,
    point(id) {
      pointed = regions.has(id) ? id : 0;
      draw();
    },
    pointByName(name) {
      const same = content.regions.find((region) => region.label === name);
      view.point(same ? same.id : 0);
    },
    pin(id, place = regions.get(id)?.place) {
      pinned = pinned === id || !regions.has(id) ? 0 : id;
      pinnedPlace = pinned ? place : null;
      for (const [key, row] of rows) row.setAttribute("aria-selected", String(key === pinned));
      draw();
    },
    pinned: () => pinnedPlace,
    // Which row has the focus, by its place in the picture and in the list.
    focused() {
      const list = Array.from(rows.values());
      const inDetails = details.contains(document.activeElement) && rows.get(drawn);
      const at = list.indexOf(inDetails || document.activeElement);
      return at < 0 ? null : { at, place: regions.get(Number(list[at].dataset.id)).place || [0, 0] };
    },
    focus({ at, place }, samePicture) {
      const list = Array.from(rows.values());
      const row = (samePicture && rows.get(view.at(...place))) || list[samePicture ? Math.min(at, list.length - 1) : 0];
      for (const other of list) other.tabIndex = other === row ? 0 : -1;
      row?.focus();
    },
    // The segment that keys are about: the one that is pointed at, else the one that is kept.
    region: () => regions.get(pointed || pinned),
    rename,
    leaveOut,
    download: () => find(".download", section).click(),
    at(x, y) {
      const column = Math.min(width - 1, Math.floor(x * width));
      const line = Math.min(height - 1, Math.floor(y * height));
      return owners[line * width + column];
    },
    showTip(x, y, id) {
      const region = regions.get(id);
      tip.hidden = !region;
      if (!region) return;
      const swatch = make("span", "swatch");
      swatch.style.background = region.colour;
      tip.replaceChildren(swatch, make("span", "tip-label", region.label));
      if (region.score !== null) tip.append(make("span", "tip-score", briefly(region)));
      tip.style.left = `${100 * x}%`;
      tip.style.top = `${100 * y}%`;
      tip.classList.toggle("leftward", x > 0.6);
      tip.classList.toggle("upward", y > 0.8);
    },
    hideTip() {
      tip.hidden = true;
    },
  };

  // A place in one picture is the same place in the other one.
  const place = (event) => {
    const box = frame.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  frame.addEventListener("pointermove", (event) => {
    const [x, y] = place(event);
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
    for (const other of views) {
      const id = other.at(x, y);
      other.point(id);
      other.showTip(x, y, id);
    }
  });
  frame.addEventListener("pointerleave", () => {
    for (const other of views) {
      other.point(0);
      other.hideTip();
    }
  });
  frame.addEventListener("click", (event) => {
    const [x, y] = place(event);
    for (const other of views) other.pin(other.at(x, y), [x, y]);
  });

  const pointFromRow = (row) => {
    const region = row && regions.get(Number(row.dataset.id));
    for (const other of views) {
      if (other === view) other.point(region ? region.id : 0);
      else other.pointByName(region ? region.label : null);
    }
  };
  legend.addEventListener("pointerover", (event) => pointFromRow(event.target.closest(".row")));
  legend.addEventListener("pointerleave", () => pointFromRow(null));
  legend.addEventListener("focusin", (event) => pointFromRow(event.target.closest(".row")));
  legend.addEventListener("focusout", (event) => {
    // On the way to its names, a row is kept.
    if (details.contains(event.relatedTarget) && pointed && pinned !== pointed) view.pin(pointed);
    pointFromRow(null);
  });
  legend.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) view.pin(Number(row.dataset.id));
  });
  legend.addEventListener("keydown", (event) => {
    if (walk(event, Array.from(rows.values())) || !event.target.matches(".row")) return;
    if (event.key === "Enter" || event.key === " ") view.pin(Number(event.target.dataset.id));
    else if (event.key === "Escape") view.pin(0);
    else return;
    event.preventDefault();
  });

  describe(null);
  return view;
}

const briefly = (region) => (region.corrected ? "✎" : figure(region.score));
const told = (region) => (region.corrected ? "named by hand" : `score ${figure(region.score)}`);

// Whether a mode's thresholds are as low as they go.
function lowered(mode) {
  const set = settings();
  return mode === "panoptic" ? !set.object_mask_threshold && !set.overlap_threshold : !set.least_score;
}

// Where nothing can point without a touch, pointing is not spoken of.
function hint(withMouse, without) {
  const text = make("p", "hint");
  text.append(make("span", "for-mouse", withMouse), make("span", "for-touch", without));
  text.append(" one in the list; that keeps it, and its names rename it.");
  return text;
}

// Labels stay inside of the picture, and those of small segments give way to those of larger ones; the legend has them all.
function spread() {
  for (const view of views) {
    const taken = [];
    const frame = view.fill.getBoundingClientRect();
    for (const tag of view.labels.children) {
      tag.classList.remove("hidden");
      tag.style.marginLeft = "0";
      const { left, right } = tag.getBoundingClientRect();
      tag.style.marginLeft = `${Math.max(0, frame.left - left) + Math.min(0, frame.right - right)}px`;
      const box = tag.getBoundingClientRect();
      const meets = (b) => box.left < b.right && b.left < box.right && box.top < b.bottom && b.top < box.bottom;
      if (taken.some(meets)) tag.classList.add("hidden");
      else taken.push(box);
    }
  }
}
