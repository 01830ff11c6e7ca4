// ---- the list of pictures ------------------------------------------------------------------------------------------

// A picture is "waiting" for its turn, at "work" until the server has its masks, then "ready"; or it has "failed", and is
// tried again when it is chosen. One is at work at a time, the chosen one before others. The server keeps only so many, so
// that what is far from the chosen one waits, and is forgotten again.
const AHEAD = 20;
const BEHIND = 5;
const KEPT = 28; // at once on the server, which keeps thirty of a visitor
const RETRY = 2000; // milliseconds
const pictures = [];
let ahead = AHEAD; // fewer where the server forgets sooner
let chosen = null; // to be shown as soon as it can be
let current = null; // what is shown
let wanted = null; // by a download of all
let working = null;
let asking = null; // whose names the server was asked for
let askAgain = false;
let changed = false; // whether something was set since what is shown was asked for

// Names that were typed for segments, for the first and the second vocabulary: classes of all pictures' files alike.
const ownWords = [[], []];

function add(added) {
  if (!added.length) return;
  for (const picture of added) {
    Object.assign(picture, { state: "waiting", step: "Waiting …", token: "", corrections: [[], []], past: [] });
    pictures.push(picture);
    picture.item = makeItem(picture);
  }
  choose(added[0]);
}

function choose(picture) {
  if (!picture) return;
  complain("");
  chosen = picture;
  if (picture.state === "failed") picture.state = "waiting";
  name();
  work();
  chosen.item.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// How far a picture is from the chosen one; at most 1 is near.
function distance(picture) {
  const steps = pictures.indexOf(picture) - pictures.indexOf(chosen);
  return steps < 0 ? -steps / BEHIND : steps / ahead;
}

function nextToWorkOn() {
  const near = pictures.filter((picture) => picture.state === "waiting" && distance(picture) <= 1);
  const at = pictures.indexOf(chosen);
  const after = near.find((picture) => pictures.indexOf(picture) >= at) || near.at(-1);
  return [chosen, wanted].find((picture) => picture?.state === "waiting") || after;
}

async function work() {
  tell();
  working ??= nextToWorkOn();
  if (!working || working.state !== "waiting") return;
  const picture = working;
  picture.state = "work";
  tell();
  try {
    await prepare(picture);
    picture.state = "ready";
  } catch (error) {
    if (error.passing && picture !== chosen) {
      // Nobody looks at it yet: it waits until the server answers again.
      picture.state = "waiting";
      working = null;
      setTimeout(work, RETRY);
      return tell();
    }
    fail(picture, error.message);
  }
  working = null;
  picture.settled?.();
  forgetTheFarthest();
  if (picture === chosen) name();
  work();
}

function forgetTheFarthest() {
  const held = pictures.filter((picture) => picture.state === "ready" && ![chosen, current, wanted].includes(picture));
  held.sort((one, other) => distance(one) - distance(other));
  for (const picture of held.slice(KEPT - 3)) {
    forget(picture.token);
    Object.assign(picture, { state: "waiting", step: "Waiting …", token: "" });
  }
}

// Wait until a picture is ready, before all but the chosen one.
async function ready(picture) {
  while (picture.state === "waiting" || picture.state === "work") {
    wanted = picture;
    await new Promise((settled) => {
      picture.settled = settled;
      work();
    });
  }
  if (picture.state === "failed") throw new Error(picture.problem);
}

// The server has forgotten the picture of a token; two questions may have found that out.
function sendAgain(picture, token) {
  if (picture.token !== token) return;
  Object.assign(picture, { state: "waiting", step: "Waiting …", token: "" });
  ahead = Math.max(1, ahead >> 1);
}

function fail(picture, message) {
  Object.assign(picture, { state: "failed", problem: message });
  if (picture !== chosen) return;
  complain(message);
  chosen = current || pictures.find((other) => other.state !== "failed") || null;
  if (chosen !== current || changed) name();
}

// Ask for the names of the chosen picture with what is set now; again after the answer if that changed meanwhile.
async function name() {
  if (chosen?.state !== "ready") return;
  askAgain = asking !== null;
  if (asking) return;
  const picture = (asking = chosen);
  const { token } = picture;
  changed = false;
  tell();
  try {
    const answer = await askNames(picture);
    picture.goneBefore = false;
    ahead = Math.min(AHEAD, ahead + 1);
    if (picture === chosen) show(answer, picture);
  } catch (error) {
    if (error.gone && !picture.goneBefore) {
      sendAgain(picture, token); // but not for ever
      picture.goneBefore = true;
    } else if (error.gone) {
      fail(picture, error.message);
    } else if (picture === chosen) {
      complain(error.message);
      if (picture !== current && error.status) show({ picture: picture.picture, views: [] }, picture);
    }
  }
  asking = null;
  root.dataset.answer = Number(root.dataset.answer || 0) + 1;
  work();
  if (askAgain || picture !== chosen) name();
  else look();
  tell();
}

// Names and omissions by hand are those of a picture and of one vocabulary.
let step = 0;
function correct(side, places, label) {
  current.past.push(current.corrections);
  step += 1;
  const kept = current.corrections[side].filter((place) => !places.replaced(place));
  const made = places.map(([x, y]) => ({ x, y, label, step, was: places.was }));
  current.corrections = current.corrections.with(side, [...kept, ...made]);
  if (label && !ownWords[side].includes(label)) ownWords[side].push(label);
  name();
}

function putBack(side, step) {
  current.past.push(current.corrections);
  current.corrections = current.corrections.with(side, current.corrections[side].filter((place) => place.step !== step));
  name();
}

function undo() {
  if (!current?.past.length) return;
  current.corrections = current.past.pop();
  name();
}

window.addEventListener("beforeunload", (event) => {
  if (pictures.some((picture) => picture.file || picture.past.length)) event.preventDefault();
});

// ---- what is seen of the list ----------------------------------------------------------------------------------------

const PATIENCE = 400; // milliseconds, after which names that are on their way are worth a word
let patience = 0;

function tell() {
  clearTimeout(patience);
  const waits = chosen && chosen.state !== "ready" && chosen.state !== "failed";
  busy(waits ? chosen.step : asking && chosen !== current ? "Naming …" : "");
  find(".stop").hidden = !exporting;
  root.setAttribute("aria-busy", String(Boolean(waits || asking)));
  if (exporting) aside(exporting.text);
  else if (!asking || chosen !== current) aside("");
  else patience = setTimeout(() => aside("Naming …"), PATIENCE);
  find(".pictures").hidden = pictures.length < 2;
  const left = pictures.filter((each) => each.state === "work" || (each.state === "waiting" && distance(each) <= 1)).length;
  const failed = pictures.filter((picture) => picture.state === "failed").length;
  const place = `${pictures.indexOf(chosen) + 1} of ${pictures.length}${left ? `, ${left} in work` : ""}`;
  find(".pictures-place").textContent = `${place}${failed ? `, ${failed} failed` : ""}`;
  find(".previous").setAttribute("aria-disabled", String(!previous()));
  find(".next").setAttribute("aria-disabled", String(!next()));
  for (const picture of pictures) {
    const { item, state, problem } = picture;
    const said = state === "failed" ? `${picture.name}, failed: ${problem}` : `${picture.name}, ${STATES[state]}`;
    item.dataset.state = state;
    item.setAttribute("aria-current", String(picture === chosen));
    item.setAttribute("aria-label", said);
    item.title = state === "failed" ? said : picture.name;
    if (!find(".pictures-list").contains(document.activeElement)) item.tabIndex = picture === chosen ? 0 : -1;
  }
}

const STATES = { waiting: "waiting", work: "in work", ready: "ready" };

function makeItem(picture) {
  const item = makeButton("picture", undefined, () => choose(picture));
  const image = make("img");
  image.src = picture.thumbnail || URL.createObjectURL(picture.file);
  image.alt = "";
  image.addEventListener("error", () => image.replaceWith(make("span", "picture-title", picture.name)));
  item.append(image);
  find(".pictures-list").append(item);
  return item;
}

// The list is one stop of the Tab key; arrows walk through it.
function walk(event, items) {
  const here = items.indexOf(event.target);
  const [back, forth] = event.currentTarget.dataset.keys.split(" ");
  const to = { [forth]: here + 1, [back]: here - 1, Home: 0, End: items.length - 1 }[event.key];
  if (here < 0 || to === undefined) return false;
  const target = items[Math.max(0, Math.min(items.length - 1, to))];
  for (const item of items) item.tabIndex = item === target ? 0 : -1;
  target.focus();
  event.preventDefault();
  event.stopPropagation();
  return true;
}
find(".pictures-list").addEventListener("keydown", (event) => walk(event, pictures.map((picture) => picture.item)));

// One that failed is tried again by a click on it alone: on the way to the next one it would be a wall.
const previous = () => pictures.slice(0, Math.max(0, pictures.indexOf(chosen))).findLast(({ state }) => state !== "failed");
const next = () => pictures.slice(pictures.indexOf(chosen) + 1).find(({ state }) => state !== "failed");
find(".previous").addEventListener("click", () => choose(previous()));
find(".next").addEventListener("click", () => choose(next()));

