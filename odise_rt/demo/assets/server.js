// ---- questions to the server -------------------------------------------------------------------------------------

// Whoever holds this may make the server forget the visitor's pictures, and no more.
const visitor = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const address = (path) => new URL(`odise/${path}`, document.baseURI).href;

// An answer; else an error in words, with `status` if the server gave one, `gone` if it has forgotten what is asked for, and
// `passing` if another try may do.
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(address(path), options);
  } catch {
    const error = new Error("The server cannot be reached: it may be stopped, or the network is down. Try again in a moment.");
    throw Object.assign(error, { passing: true });
  }
  if (answer.ok) return answer;
  const content = await answer.json().catch(() => ({}));
  const error = new Error(content.error || `The server answered ${answer.status}: try again in a moment.`);
  const { status } = answer;
  throw Object.assign(error, { status, gone: status === 404, passing: status === 503 });
}

const post = async (path, content) =>
  (await ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(content) })).json();

async function send({ file, name }) {
  let data;
  try {
    data = await file.arrayBuffer();
  } catch {
    throw new Error(`${name} cannot be read: it may be a folder, or was moved or changed since it was chosen.`);
  }
  const headers = { "Content-Type": "application/octet-stream", "X-Odise-Picture": encodeURIComponent(name) };
  return (await ask("pictures", { method: "POST", headers, body: data })).json();
}

// See that the server has a picture and its masks.
async function prepare(picture) {
  for (let attempt = 1; ; attempt += 1) {
    if (!picture.token) {
      picture.step = picture.file ? `Sending ${picture.name} …` : "Fetching the example …";
      tell();
      picture.token = (await (picture.file ? send(picture) : post(`examples/${picture.example}`))).token;
    }
    picture.step = "Finding masks …";
    tell();
    try {
      return Object.assign(picture, await post("masks", { visitor, token: picture.token }));
    } catch (error) {
      if (!error.gone || attempt > 1) throw error;
      picture.token = "";
    }
  }
}

const askNames = (picture, set = settings()) => {
  const by_hand = picture.corrections.map((places, side) => ({
    places: places.map(({ x, y, label }) => [x, y, label]),
    words: ownWords[side],
  }));
  return post("names", { visitor, token: picture.token, settings: set, by_hand });
};

const letters = (count, side) => (count > 1 ? "AB"[side] : "");

// One result of a picture as a file, and its name.
async function fetchFile(state, side, kind) {
  const letter = letters(state.views.length, side);
  const path = `pictures/${state.picture.token}/${state.views[side].key}/${kind}${letter && `?side=${letter}`}`;
  const answer = await ask(path);
  const name = /filename\*=UTF-8''([^;]+)/.exec(answer.headers.get("Content-Disposition"));
  return { blob: await answer.blob(), name: name ? decodeURIComponent(name[1]) : kind };
}

const forget = (token) => ask(`pictures/${token}`, { method: "DELETE" }).catch(() => {}); // it would be in time, anyway
window.addEventListener("pagehide", () => {
  const content = new Blob([JSON.stringify({ visitor })], { type: "application/json" });
  navigator.sendBeacon(address("leave"), content);
});

