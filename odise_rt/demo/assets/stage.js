// ---- pictures come in ------------------------------------------------------------------------------------------------

const take = (files) => add(Array.from(files, (file) => ({ file, name: file.name || "picture" })));
find(".drop").addEventListener("click", () => find(".file").click());
find(".file").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});

// Wherever a file is dropped: elsewhere the browser would leave the page for it.
let dragging = 0;
function drag(event, count) {
  if (!Array.from(event.dataTransfer?.types || []).includes("Files")) return false;
  dragging = Math.max(0, count);
  root.classList.toggle("dragging", dragging > 0);
  return true;
}
document.addEventListener("dragenter", (event) => drag(event, dragging + 1));
document.addEventListener("dragleave", (event) => drag(event, dragging - 1));
document.addEventListener("dragover", (event) => drag(event, dragging) && event.preventDefault());
document.addEventListener("drop", async (event) => {
  if (!drag(event, 0)) return;
  event.preventDefault();
  const entries = Array.from(event.dataTransfer.items, (item) => item.webkitGetAsEntry?.()); // now, before any wait
  const files = Array.from(event.dataTransfer.files);
  if (!entries.some((entry) => entry?.isDirectory)) return take(files);
  const found = (await Promise.all(entries.filter(Boolean).map(filesOf))).flat();
  if (found.length) take(found);
  else complain("There is no picture in this folder.");
});

// The files of an entry; of a folder, its pictures and those of its folders.
async function filesOf(entry, inFolder = false) {
  if (!entry.isDirectory) {
    const file = await new Promise((done, failed) => entry.file(done, failed)).catch(() => null);
    return file && (!inFolder || file.type.startsWith("image/")) ? [file] : [];
  }
  const reader = entry.createReader();
  const entries = [];
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed)).catch(() => []); // a hundred at a time
    if (!some.length) break;
    entries.push(...some);
  }
  entries.sort((one, other) => one.name.localeCompare(other.name, undefined, { numeric: true }));
  return (await Promise.all(entries.map((each) => filesOf(each, true)))).flat();
}

document.addEventListener("paste", (event) => {
  const files = Array.from(event.clipboardData?.files || []).filter((file) => file.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  take(files);
});

const examples = find(".examples");
if (props.examples.length) examples.append(make("span", "examples-title", "or take an example"));
props.examples.forEach((example, index) => {
  const button = makeButton("example", undefined, () => {
    bringWords(example);
    const known = pictures.find((picture) => picture.example === index);
    if (known) choose(known);
    else add([{ example: index, name: example.title, thumbnail: example.thumbnail }]);
  });
  button.title = example.title;
  const image = make("img");
  image.src = example.thumbnail;
  image.alt = `Example: ${example.title}`;
  button.append(image);
  examples.append(button);
});

// ---- the page around ---------------------------------------------------------------------------------------------------

const columns = root.closest(".columns");
const controls = columns.querySelector(".controls");
const oneColumn = window.matchMedia("(max-width: 820px)");
// Where the picture stands above the controls, it also comes before them for the keyboard.
function arrange() {
  if (oneColumn.matches) columns.append(controls);
  else columns.prepend(controls);
}
oneColumn.addEventListener("change", arrange);
arrange();

// What stands below moves up when the banner goes, and a click that has begun must not lose its target: it takes the focus
// from the field for words, and that sets them.
let pressed = false;
window.addEventListener("pointerdown", () => (pressed = true), true);
for (const type of ["pointerup", "pointercancel"]) window.addEventListener(type, () => (pressed = false), true);
function takeBack() {
  const before = find(".banner-text").textContent;
  const clear = () => find(".banner-text").textContent === before && complain("");
  if (pressed) window.addEventListener("pointerup", () => setTimeout(clear), { once: true });
  else clear();
}

let lookAtAnswer = false;
// Sent by the page when something was set.
window.addEventListener("odise-set", ({ detail }) => {
  if (detail === "typed" || !chosen) return; // typing alone asks for nothing
  lookAtAnswer ||= detail === "applied" && oneColumn.matches;
  changed = true;
  takeBack();
  if (chosen.state === "failed") choose(chosen);
  else name();
});
function look() {
  if (!lookAtAnswer) return;
  lookAtAnswer = false;
  (find(".banner").hidden ? find(".work") : find(".banner")).scrollIntoView({ block: "start" });
}

const NARROW = 700; // pixels, below which everything stands in one column
new ResizeObserver(() => {
  root.classList.toggle("narrow", root.clientWidth < NARROW);
  spread();
}).observe(root);

// ---- what the server says ----------------------------------------------------------------------------------------------

let shown = "";

function show(state, picture) {
  if (state.times) {
    const { network, words, names } = state.times;
    const ran = picture.ran || state.times.ran;
    picture.ran = false; // as of now
    find(".times").replaceChildren(
      make("span", ran ? "time ran" : "time kept", ran ? `network ${duration(network)}` : "network not run again"),
      make("span", "time", `words ${duration(words)}`),
      make("span", "time", `naming ${duration(names)}`),
    );
  }
  // Leaving the field for words asks again, often for what is there: pointer, focus and scrolling stay as they are.
  const identity = [state.picture.token, ...state.views.map((content) => content.key)].join(" ");
  if (identity === shown) return;
  shown = identity;
  // Another threshold may turn one person into two: what was chosen is known by its place, not by its name.
  const same = picture === current;
  const kept = same ? views.map((view) => view.pinned()) : [];
  const focused = views.map((view) => view.focused());
  const renaming = views.findIndex((view) => view.section.querySelector(".choice:focus"));
  const byMouse = views.some((view) => view.section.contains(document.activeElement)) && !find(":focus-visible");
  current = picture;
  const place = find(".views");
  find(".work").hidden = false;
  root.dataset.phase = "shown";
  find(".picture-name").textContent = state.picture.name;
  find(".picture-size").textContent = `${state.picture.width} × ${state.picture.height}`;
  place.dataset.count = Math.max(1, state.views.length);
  place.dataset.mode = state.mode;
  views = [];
  views = state.views.map((content, index) => makeView(content, state, index, state.views.length));
  place.replaceChildren(...views.map((view) => view.section));
  if (!views.length) place.append(makeUnnamed(state.picture));
  views.forEach((view, index) => kept[index] && view.pin(view.at(...kept[index]), kept[index]));
  const choice = views[renaming]?.section.querySelector(".choice[aria-pressed=true]");
  if (choice) choice.focus();
  else if (byMouse) root.focus({ preventScroll: true });
  else views.forEach((view, index) => focused[index] && view.focus(focused[index], same));
  const counts = state.views.map(({ regions }) => `${regions.length} ${NOUNS[state.mode][regions.length === 1 ? 0 : 1]}`);
  say(`${state.picture.name}: ${counts.join(" and ") || "not named"}`);
  spread();
}

// A picture for which there are no names, as of words that cannot be used.
function makeUnnamed(picture) {
  const section = make("section", "view");
  section.setAttribute("aria-label", "Picture");
  const frame = makeFrame(picture);
  find(".photo", frame).alt = picture.name;
  section.append(frame);
  return section;
}

find(".opacity").addEventListener("input", (event) => {
  opacity = event.target.value / 100;
  for (const view of views) view.fill.style.opacity = opacity;
});
find(".show-labels").addEventListener("change", (event) => root.classList.toggle("no-labels", !event.target.checked));

// ---- keys ------------------------------------------------------------------------------------------------------------

// They count while the focus is inside of the stage, and not in a field.
root.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select, textarea, summary") || event.ctrlKey || event.altKey || event.metaKey) return;
  const view = views.find((each) => each.section.contains(document.activeElement)) || views[0];
  const region = view?.region();
  const key = event.key.toLowerCase();
  if (key === "n" || key === "arrowright") choose(next());
  else if (key === "p" || key === "arrowleft") choose(previous());
  else if (/^[1-5]$/.test(key) && region?.names[key - 1]) view.rename(region, region.names[key - 1].label);
  else if ((key === "delete" || key === "backspace") && region) view.leaveOut(region);
  else if (key === "z") undo();
  else if (key === "d") view?.download();
  else return;
  event.preventDefault();
});
