// The picture, its segments and everything one can do with them. Gradio runs these files, one after the other, as the body
// of one function with `element`, `props` and `trigger`. Text from outside is only ever set as textContent.

const root = element.querySelector(".stage");
const find = (selector, inside = root) => inside.querySelector(selector);

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function makeButton(className, text, act) {
  const made = make("button", className, text);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

const percent = (share) => (share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`);
const figure = (score) => (score === null ? "" : score.toFixed(2));
const duration = (seconds) => (seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(2)} s`);

// ---- messages --------------------------------------------------------------------------------------------------

function complain(message) {
  find(".banner").hidden = !message;
  find(".banner-text").textContent = message || "";
}
find(".banner-close").addEventListener("click", () => complain(""));

// The whole stage waits for another picture;
function busy(text) {
  find(".busy").hidden = !text;
  find(".busy-text").textContent = text || "";
}

// what goes on beside what is shown stands in its toolbar.
function aside(text) {
  find(".aside").hidden = !text;
  find(".aside-text").textContent = text || "";
}

// To those who hear the page.
const say = (text) => (find(".said").textContent = text);

// ---- what is set on the page -------------------------------------------------------------------------------------

// Gradio tells the values of its controls, in the order of props.settings.
const finite = (value, before) => (Number.isFinite(value) ? value : before); // while one is typed, it may be none
let lastSet = {};
function settings() {
  const values = Object.fromEntries(props.settings.map((name, index) => [name, window.odiseSettings[index]]));
  for (const [name, value] of Object.entries(values)) {
    if (name.endsWith("words")) values[name] = value || "";
    else if (name.endsWith("lists")) values[name] = value || [];
    else if (typeof value !== "boolean" && name !== "mode") values[name] = finite(value, lastSet[name] ?? 0);
  }
  return (lastSet = values);
}

// Words that come from the page itself give way to those of an example; a visitor's own do not.
function bringWords({ words }) {
  const replaceable = ["", props.starting_words, ...props.examples.map((example) => example.words)];
  if (!words || !replaceable.includes(settings().words.trim())) return;
  window.odiseSettings = window.odiseSettings.with(props.settings.indexOf("words"), words);
  trigger("bring");
}

