// The picture, its segments and everything one can do with them. Gradio runs this once, as the body of a function with
// `element`, `props`, `watch` and `trigger`. Text from outside is only ever set as textContent.

const root = element.querySelector(".stage");
const find = (selector, inside = root) => inside.querySelector(selector);
const address = (path) => new URL(path, document.baseURI).href;

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);
const figure = (score) => (score === null ? "" : score.toFixed(2));
const duration = (seconds) => (seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`);

let views = [];
let opacity = 0.55;
let format = "overlay"; // of downloads, the last that was chosen

// ---- messages --------------------------------------------------------------------------------------------------

function complain(message) {
  find(".banner").hidden = !message;
  find(".banner-text").textContent = message || "";
}

function busy(text, aside = false) {
  find(".busy").hidden = !text;
  find(".busy").classList.toggle("aside", aside);
  find(".busy-text").textContent = text || "";
  root.setAttribute("aria-busy", text ? "true" : "false");
}

find(".banner-close").addEventListener("click", () => complain(""));

// ---- pictures come in ------------------------------------------------------------------------------------------

// A picture is "waiting" for its turn, at "work" until the server has its masks, then "ready"; or it has "failed", and is
// tried again when it is chosen. One is at work at a time, the chosen one before others.
const pictures = [];
let chosen = null; // to be shown as soon as it can be
let current = null; // what is shown
let working = null;
let asking = null; // whose names the server was asked for
let askAgain = false;
let changed = false; // whether something was set since what is shown was asked for

function add(added) {
  if (!added.length) return;
  for (const picture of added) {
    Object.assign(picture, { state: "waiting", step: "Waiting …", token: "", ran: false, corrections: [] });
    pictures.push(picture);
    picture.item = makeItem(picture);
  }
  choose(added[0]);
}

function choose(picture) {
  complain("");
  chosen = picture;
  if (picture.state === "failed") picture.state = "waiting";
  name();
  work();
  chosen.item.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function work() {
  if (!working) {
    working = chosen?.state === "waiting" ? chosen : pictures.find((picture) => picture.state === "waiting") || null;
    if (working) prepare(working);
  }
  tell();
}

async function prepare(picture) {
  picture.state = "work";
  try {
    if (picture.file) {
      picture.step = `Sending ${picture.name} …`;
      picture.token = await send(picture.file, picture.name);
    }
    picture.step = "Finding masks …";
    tell();
    trigger("find", picture.file ? { token: picture.token } : { example: picture.example });
  } catch (error) {
    found({ error: error instanceof TypeError ? "The server cannot be reached: it may be stopped." : error.message });
  }
}

async function send(file, name) {
  const answer = await fetch(address("odise/pictures"), {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream", "X-Odise-Picture": encodeURIComponent(name) },
    body: file,
  });
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok || !content.token) throw new Error(content.error || `the server answered ${answer.status}`);
  return content.token;
}

function found(answer) {
  const picture = working;
  if (!picture) return;
  working = null;
  if (answer.error) {
    fail(picture, answer.error);
  } else {
    Object.assign(picture, { state: "ready", token: answer.token, ran: answer.ran });
    if (picture === chosen) name();
  }
  work();
}

function fail(picture, message) {
  picture.state = "failed";
  picture.item.title = `${picture.name}: ${message}`;
  if (picture !== chosen) return;
  complain(message);
  chosen = current || pictures.find((other) => other.state !== "failed") || null;
  if (chosen !== current || changed) name();
}

// Ask for the names of the chosen picture with what is set now; again after the answer if that changed meanwhile.
function name() {
  if (chosen?.state !== "ready") return;
  askAgain = asking !== null;
  if (asking) return;
  asking = chosen;
  changed = false;
  const { token, example, corrections } = asking;
  trigger("name", { token, corrections, ...(asking.bringsWords && { example }) });
  tell();
}

function named(answer) {
  const picture = asking;
  if (!picture) return;
  asking = null;
  if (answer.gone && !picture.gone) {
    Object.assign(picture, { state: "waiting", step: "Waiting …", gone: true }); // sent again, but not for ever
    work();
  } else if (answer.gone) {
    fail(picture, answer.error);
  } else if (picture === chosen) {
    picture.gone = false;
    picture.bringsWords = false;
    if (answer.error) complain(answer.error);
    else show(answer, picture);
  }
  if (askAgain || picture !== chosen) name();
  tell();
}

// The whole stage waits for another picture; names change beside what is shown, and only say so if they take their time.
const PATIENCE = 400; // milliseconds
let patience = 0;

// Say what is going on: in the list, and over the stage.
function tell() {
  clearTimeout(patience);
  if (chosen && chosen.state !== "ready" && chosen.state !== "failed") busy(chosen.step);
  else if (!asking) busy("");
  else if (chosen !== current) busy("Naming …");
  else patience = setTimeout(() => busy("Naming …", true), PATIENCE);
  find(".pictures").hidden = pictures.length < 2;
  const at = pictures.indexOf(chosen);
  const left = pictures.filter((picture) => picture.state === "waiting" || picture.state === "work").length;
  find(".pictures-place").textContent = `${at + 1} of ${pictures.length}${left ? `, ${left} in work` : ""}`;
  find(".previous").disabled = !previous();
  find(".next").disabled = !next();
  for (const picture of pictures) {
    picture.item.dataset.state = picture.state;
    picture.item.setAttribute("aria-current", String(picture === chosen));
    picture.item.setAttribute("aria-label", `${picture.name}, ${STATES[picture.state]}`);
    if (picture.state !== "failed") picture.item.title = picture.name;
  }
}

const STATES = { waiting: "waiting", work: "in work", ready: "ready", failed: "failed: try again" };

function makeItem(picture) {
  const item = make("button", "picture");
  item.type = "button";
  const image = make("img");
  image.src = picture.thumbnail || URL.createObjectURL(picture.file);
  image.alt = "";
  image.addEventListener("error", () => image.replaceWith(make("span", "picture-title", picture.name)));
  item.append(image);
  item.addEventListener("click", () => choose(picture));
  find(".pictures-list").append(item);
  return item;
}

// One that failed is tried again by a click on it alone: on the way to the next one it would be a wall.
const previous = () => pictures.slice(0, Math.max(0, pictures.indexOf(chosen))).findLast(({ state }) => state !== "failed");
const next = () => pictures.slice(pictures.indexOf(chosen) + 1).find(({ state }) => state !== "failed");
find(".previous").addEventListener("click", () => choose(previous()));
find(".next").addEventListener("click", () => choose(next()));

// Sent by the page when something was set.
window.addEventListener("odise-changed", () => {
  if (!chosen) return;
  changed = true;
  complain("");
  if (chosen.state === "failed") choose(chosen);
  else name();
});
// Sent by the page when an event failed without an answer, as when the server is gone or its queue is full.
window.addEventListener("odise-failed", (event) => {
  const message = "The server did not answer: it may be stopped or have too much to do. Try again in a moment.";
  if (event.detail === "find") found({ error: message });
  else named({ error: message });
});

const take = (files) => add(Array.from(files, (file) => ({ file, name: file.name || "picture" })));
find(".drop").addEventListener("click", () => find(".file").click());
find(".file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
let dragging = 0;
const carriesFile = (event) => Array.from(event.dataTransfer?.types || []).includes("Files");
root.addEventListener("dragenter", (event) => {
  if (!carriesFile(event)) return;
  dragging += 1;
  root.classList.add("dragging");
});
root.addEventListener("dragleave", (event) => {
  if (!carriesFile(event)) return;
  dragging = Math.max(0, dragging - 1);
  root.classList.toggle("dragging", dragging > 0);
});
root.addEventListener("dragover", (event) => carriesFile(event) && event.preventDefault());
root.addEventListener("drop", (event) => {
  dragging = 0;
  root.classList.remove("dragging");
  if (!carriesFile(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  const files = Array.from(event.clipboardData?.files || []).filter((file) => file.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  take(files);
});

const examples = find(".examples");
if (props.examples.length) examples.append(make("span", "examples-title", "or take an example"));
props.examples.forEach((example, index) => {
  const button = make("button", "example");
  button.type = "button";
  button.title = example.title;
  const image = make("img");
  image.src = example.thumbnail;
  image.alt = `Example: ${example.title}`;
  button.append(image);
  button.addEventListener("click", () => {
    const known = pictures.find((picture) => picture.example === index);
    const taken = known || { example: index, name: example.title, thumbnail: example.thumbnail };
    taken.bringsWords = true;
    if (known) choose(known);
    else add([taken]);
  });
  examples.append(button);
});

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

function makeView(content, state, index, count) {
  const { width, height } = content.map;
  const owners = unroll(content.map, width * height);
  // Lines of about one and a half pixels of the screen, however much the picture is scaled.
  const room = find(".views").clientWidth || width;
  const thickness = Math.max(1, Math.round((1.2 * width) / (count > 1 ? room / 2 : room)));
  const edge = borders(owners, width, height, thickness);
  const regions = new Map(content.regions.map((region) => [region.id, region]));
  const letter = "AB"[index];

  const section = make("section", "view");
  section.setAttribute("aria-label", count > 1 ? `Result with vocabulary ${letter}` : "Result");
  const frame = make("div", "frame");
  frame.style.aspectRatio = `${state.picture.width} / ${state.picture.height}`;
  // Tall pictures are held to the window's height by their width.
  frame.style.setProperty("--ratio", state.picture.width / state.picture.height);
  const photo = make("img", "photo");
  photo.src = address(`odise/pictures/${state.picture.token}/shown.jpg`);
  photo.draggable = false;
  photo.alt = `${state.picture.name}: ${content.regions.map((r) => r.label).join(", ") || "no segment"}`;

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
  frame.append(photo, fill, lines, light, labels, tip);

  for (const region of content.regions) {
    if (!region.place) continue;
    const tag = make("span", "label", region.label);
    tag.style.left = `${100 * region.place[0]}%`;
    tag.style.top = `${100 * region.place[1]}%`;
    tag.style.background = region.colour;
    tag.style.color = region.ink;
    labels.append(tag);
  }

  const side = make("div", "side");
  const heading = make("div", "side-heading");
  const noun = { panoptic: "segment", semantic: "class", instance: "object" }[state.mode];
  const plural = noun === "class" ? "classes" : `${noun}s`;
  const number = content.regions.length;
  heading.append(make("span", "side-title", count > 1 ? `Vocabulary ${letter}` : number === 1 ? noun : plural));
  const found = noun === "class" ? `${number} of` : `${number} ${number === 1 ? noun : plural} from`;
  const given = `${content.classes.toLocaleString("en")} ${content.classes === 1 ? "class" : "classes"}`;
  heading.append(make("span", "side-note", `${found} ${given}, ${content.seen.toLocaleString("en")} seen in training`));
  const legend = make("ul", "legend");
  legend.setAttribute("role", "listbox");
  legend.setAttribute("aria-label", count > 1 ? `Segments with vocabulary ${letter}` : "Segments");
  const details = make("div", "details");
  details.setAttribute("aria-live", "polite");
  const downloads = make("div", "downloads");
  const formats = make("select", "format");
  formats.setAttribute("aria-label", `Format of the download${count > 1 ? ` of vocabulary ${letter}` : ""}`);
  for (const { kind, title } of props.formats) formats.append(new Option(title, kind, false, kind === format));
  const link = make("a", "download", "Download");
  link.setAttribute("aria-label", `Download${count > 1 ? ` the result of vocabulary ${letter}` : ""}`);
  link.download = "";
  const aim = () => {
    format = formats.value;
    const side = count > 1 ? `?side=${letter}` : "";
    link.href = address(`odise/pictures/${state.picture.token}/${content.key}/${format}${side}`);
  };
  formats.addEventListener("change", aim);
  aim();
  downloads.append(formats, link);
  side.append(heading, legend, details, downloads);
  section.append(frame, side);

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
    const score = make("span", "score", figure(region.score));
    const share = make("span", "share", percent(region.share));
    row.append(swatch, name, score, share);
    const scored = region.score === null ? "" : `, score ${figure(region.score)}`;
    row.setAttribute("aria-label", `${region.label}${scored}, ${percent(region.share)} of the picture`);
    legend.append(row);
    rows.set(region.id, row);
  }
  if (!number) legend.append(make("li", "none", `No ${noun}: lower the thresholds or try other words.`));

  let pinned = 0;
  let pinnedPlace = null; // where, as shares of width and height
  let pointed = 0;
  let drawn = -1;

  function describe(region) {
    details.replaceChildren();
    if (!region) {
      const hint = number ? "Point at a segment, or choose one in the list; a click keeps it, and one on a name renames it." : "";
      details.append(make("p", "hint", hint));
      return;
    }
    const head = make("div", "details-head");
    const swatch = make("span", "swatch");
    swatch.style.background = region.colour;
    head.append(swatch, make("strong", "details-label", region.label));
    if (region.score !== null) head.append(make("span", "details-score", `score ${figure(region.score)}`));
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
      const choice = make("button", "choice", candidate.label);
      choice.type = "button";
      choice.setAttribute("aria-pressed", String(candidate.label === region.label));
      choice.addEventListener("click", () => rename(region, candidate.label));
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
  }

  // Names are corrected where the segment is: its number changes with the thresholds, its place does not.
  function rename(region, label) {
    if (!region.place) return;
    const kept = current.corrections.filter(([x, y]) => view.at(x, y) !== region.id);
    current.corrections = [...kept, [...region.place, label]];
    name();
  }

  function draw() {
    const id = pointed || pinned;
    if (id === drawn) return;
    drawn = id;
    const region = regions.get(id);
    for (const [key, row] of rows) row.classList.toggle("active", key === id);
    section.classList.toggle("picking", Boolean(region));
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
    focused() {
      const row = Array.from(rows.values()).find((candidate) => candidate === document.activeElement);
      return row ? regions.get(Number(row.dataset.id)).place || [0, 0] : null;
    },
    focus(place) {
      (rows.get(view.at(...place)) || rows.values().next().value)?.focus();
    },
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
      if (region.score !== null) tip.append(make("span", "tip-score", figure(region.score)));
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
  legend.addEventListener("focusout", () => pointFromRow(null));
  legend.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) view.pin(Number(row.dataset.id));
  });
  legend.addEventListener("keydown", (event) => {
    const list = Array.from(rows.values());
    const here = list.indexOf(event.target);
    if (here < 0) return;
    const next = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: list.length - 1 }[event.key];
    if (next !== undefined) {
      const target = list[Math.max(0, Math.min(list.length - 1, next))];
      for (const row of list) row.tabIndex = row === target ? 0 : -1;
      target.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      view.pin(Number(event.target.dataset.id));
    } else if (event.key === "Escape") {
      view.pin(0);
    } else {
      return;
    }
    event.preventDefault();
  });

  describe(null);
  return view;
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
const NARROW = 700; // pixels, below which everything stands in one column
new ResizeObserver(() => {
  root.classList.toggle("narrow", root.clientWidth < NARROW);
  spread();
}).observe(root);

// ---- what the server says --------------------------------------------------------------------------------------

let shown = "";

function show(state, picture) {
  const { network, words, names } = state.times;
  const ran = picture.ran || state.times.ran;
  picture.ran = false; // as of now
  find(".times").replaceChildren(
    make("span", ran ? "time ran" : "time kept", ran ? `network ${duration(network)}` : "network not run again"),
    make("span", "time", `words ${duration(words)}`),
    make("span", "time", `naming ${duration(names)}`),
  );
  // Leaving the field for words asks again, often for what is there: pointer, focus and scrolling stay as they are.
  const identity = [state.picture.token, ...state.views.map((content) => content.key)].join(" ");
  if (identity === shown) return;
  shown = identity;
  // Another threshold may turn one person into two: what was chosen is known by its place, not by its name.
  const kept = picture === current ? views.map((view) => view.pinned()) : [];
  const focused = views.map((view) => view.focused());
  const renaming = views.findIndex((view) => view.section.querySelector(".choice:focus"));
  current = picture;
  const place = find(".views");
  find(".work").hidden = false;
  root.dataset.phase = "shown";
  find(".picture-name").textContent = state.picture.name;
  find(".picture-size").textContent = `${state.picture.width} × ${state.picture.height}`;
  place.dataset.count = state.views.length;
  place.dataset.mode = state.mode;
  views = [];
  views = state.views.map((content, index) => makeView(content, state, index, state.views.length));
  place.replaceChildren(...views.map((view) => view.section));
  views.forEach((view, index) => kept[index] && view.pin(view.at(...kept[index]), kept[index]));
  views.forEach((view, index) => focused[index] && view.focus(focused[index]));
  views[renaming]?.section.querySelector(".choice[aria-pressed=true]")?.focus();
  spread();
}

watch("value", () => {
  if (!props.value) return;
  named(props.value);
  root.dataset.answer = props.value.serial;
});
watch("found", () => props.found && found(props.found));

find(".opacity").addEventListener("input", (event) => {
  opacity = event.target.value / 100;
  for (const view of views) view.fill.style.opacity = opacity;
});
find(".show-labels").addEventListener("change", (event) => root.classList.toggle("no-labels", !event.target.checked));
