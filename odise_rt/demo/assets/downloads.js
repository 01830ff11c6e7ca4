// ---- files ---------------------------------------------------------------------------------------------------------

let format = "overlay"; // the last that was chosen
let exporting = null; // the download that is being made, with what is said of it

function makeDownloads(state, side) {
  const letter = letters(state.views.length, side);
  const of = letter && ` of vocabulary ${letter}`;
  const downloads = make("div", "downloads");
  const formats = make("select", "format");
  formats.setAttribute("aria-label", `Format of the download${of}`);
  for (const { kind, title } of props.formats) formats.append(new Option(title, kind, false, kind === format));
  formats.addEventListener("change", () => (format = formats.value));
  const one = makeButton("download", "Download", () => saving(() => saveOne(current, state, side, formats.value)));
  const all = makeButton("download-all", "All as ZIP", () => saving((mine) => saveAll(side, formats.value, mine)));
  one.setAttribute("aria-label", `Download the result${of}`);
  all.setAttribute("aria-label", `Download the results of all pictures${of} as one ZIP file`);
  all.title = "All pictures as one ZIP file, with what is set now";
  downloads.append(formats, one, all);
  return downloads;
}

async function saving(work) {
  if (exporting) return;
  complain("");
  const mine = (exporting = { text: "Making the file …" });
  tell();
  try {
    await work(mine);
  } catch (error) {
    complain(error.message);
  }
  if (exporting === mine) exporting = null;
  wanted = null;
  tell();
}
find(".stop").addEventListener("click", () => {
  exporting = null;
  tell();
});

function save({ blob, name }) {
  const link = make("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function saveOne(picture, state, side, kind) {
  try {
    save(await fetchFile(state, side, kind));
  } catch (error) {
    if (!error.gone) throw error;
    save(await fetchFile(await renewed(picture), side, kind)); // the server has forgotten it
  }
}

// The names of a picture, which is sent again if it must be.
async function renewed(picture, set = settings()) {
  for (let attempt = 1; ; attempt += 1) {
    await ready(picture);
    const { token } = picture;
    try {
      return await askNames(picture, set);
    } catch (error) {
      if (!error.gone || attempt > 1) throw error;
      sendAgain(picture, token);
    }
  }
}

// Every picture that has not failed. COCO and CVAT have one document for all of them.
async function saveAll(side, kind, mine) {
  const set = settings();
  const files = [];
  const documents = [];
  const taken = new Set();
  const list = pictures.slice();
  let failed = 0;
  for (const [index, picture] of list.entries()) {
    mine.text = `Making file ${index + 1} of ${list.length} …`;
    tell();
    const state = await renewed(picture, set).catch((error) => {
      if (picture.state !== "failed") throw error;
      failed += 1;
    });
    if (exporting !== mine) return;
    if (!state) continue;
    const { blob, name } = await fetchFile(state, side, kind === "coco" ? "coco-document" : kind);
    const stem = unique(state.picture.name.replace(/\.[^.]*$/, ""), taken);
    if (kind === "coco") {
      documents.push({ stem, ...JSON.parse(await blob.text()) });
      files.push({ name: `panoptic/${stem}.png`, blob: (await fetchFile(state, side, "png")).blob });
    } else if (kind === "cvat") {
      documents.push(await blob.text());
    } else {
      files.push({ name: stem + name.slice(state.picture.name.replace(/\.[^.]*$/, "").length), blob });
    }
  }
  if (failed) complain(`${failed} of ${list.length} pictures failed and are not in the file.`);
  if (kind === "coco" && documents.length) files.push({ name: "panoptic.json", blob: new Blob([JSON.stringify(joinedCoco(documents))]) });
  if (kind === "cvat" && documents.length) files.push({ name: "cvat.xml", blob: new Blob(joinedCvat(documents)) });
  if (exporting === mine && files.length) save({ blob: await zip(files), name: `odise_rt.${kind}.zip` });
}

function unique(stem, taken) {
  let name = stem;
  for (let number = 2; taken.has(name); number += 1) name = `${stem} (${number})`;
  taken.add(name);
  return name;
}

// An image called by a number has it as its id, as in files of `odise-rt segment`; others have the free ones.
function joinedCoco(documents) {
  const own = ({ stem }) => (/^[0-9]{1,15}$/.test(stem) ? Number(stem) : null);
  const times = new Map();
  for (const document of documents) times.set(own(document), (times.get(own(document)) || 0) + 1);
  let free = 0;
  const joined = { images: [], annotations: [], categories: documents.at(-1).categories }; // later ones have all words
  for (const document of documents) {
    let id = own(document);
    if (id === null || times.get(id) > 1) {
      do free += 1;
      while (times.get(free) === 1);
      id = free;
    }
    joined.images.push({ ...document.images[0], id });
    joined.annotations.push({ ...document.annotations[0], image_id: id, file_name: `${document.stem}.png` });
  }
  return joined;
}

function joinedCvat(documents) {
  const start = (text) => text.indexOf("<image ");
  const end = (text) => text.lastIndexOf("</annotations>");
  const images = documents.map((text, id) => text.slice(start(text), end(text)).replace('<image id="0"', `<image id="${id}"`));
  const last = documents.at(-1); // has all words
  return [last.slice(0, start(last)), ...images, last.slice(end(last))];
}

// ---- a ZIP file of files as they are -----------------------------------------------------------------------------------

const CRC = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});
const crc = (bytes) => ~bytes.reduce((sum, byte) => (sum >>> 8) ^ CRC[(sum ^ byte) & 255], ~0) >>> 0;

// Fields of 2 and 4 bytes, as [size, value].
function packed(fields) {
  const bytes = new Uint8Array(fields.reduce((sum, [size]) => sum + size, 0));
  const data = new DataView(bytes.buffer);
  let place = 0;
  for (const [size, value] of fields) {
    if (size === 2) data.setUint16(place, value, true);
    else data.setUint32(place, value, true);
    place += size;
  }
  return bytes;
}

async function zip(files) {
  const parts = [];
  const directory = [];
  let place = 0;
  for (const { name, blob } of files) {
    const encoded = new TextEncoder().encode(name);
    const size = blob.size;
    // Version 2.0, names in UTF-8, stored, no time (1 January 1980).
    const common = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 33], [4, crc(new Uint8Array(await blob.arrayBuffer()))],
      [4, size], [4, size], [2, encoded.length], [2, 0]]; // prettier-ignore
    parts.push(packed([[4, 0x04034b50], ...common]), encoded, blob);
    directory.push(packed([[4, 0x02014b50], [2, 20], ...common, [2, 0], [2, 0], [2, 0], [4, 0], [4, place]]), encoded);
    place += 30 + encoded.length + size;
    if (place > 0xf0000000 || files.length > 65000) throw new Error("That is too much for one ZIP file: take fewer pictures.");
  }
  const length = directory.reduce((sum, part) => sum + part.length, 0);
  const count = files.length;
  const end = packed([[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, length], [4, place], [2, 0]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

