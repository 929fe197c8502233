// What one sees and does: photographs, the camera, boxes, threshold, classes, times, JSON.

import { Detector } from "./detector.js";

const $ = (name) => document.getElementById(name);
const entries = []; // of the photographs: name, address, width, height, found, ms
let detector, shown, video;
const hidden = new Set(); // classes, by label

// --- words

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const milliseconds = (ms) => `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms`;
const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
const hue = (label) => (90 + 137.5 * label) % 360;

function say(text, part) {
  $("status").textContent = text;
  $("progress").hidden = !text;
  part === undefined ? $("bar").removeAttribute("value") : ($("bar").value = part);
}

function complain(sentence) {
  const item = document.createElement("li");
  const close = document.createElement("button");
  item.textContent = sentence;
  close.textContent = "×";
  close.ariaLabel = "Dismiss";
  close.onclick = () => item.remove();
  item.append(close);
  $("problems").append(item);
}

// --- what was detected

/** The detections of a photograph that threshold and classes leave. */
const chosen = ({ found }) => found.filter(({ score, label }) => score >= $("score").valueAsNumber && !hidden.has(label));

function makeBox({ box: [x0, y0, x1, y1], score, label }, { width, height }) {
  const element = document.createElement("div");
  const text = document.createElement("span");
  const names = detector.about.class_names;
  element.className = "box";
  element.classList.toggle("top", y0 / height < 0.03);
  element.classList.toggle("right", (x0 + x1) / 2 / width > 0.75);
  element.style.cssText = `left:${(100 * x0) / width}%; top:${(100 * y0) / height}%;
    width:${(100 * (x1 - x0)) / width}%; height:${(100 * (y1 - y0)) / height}%; --hue:${hue(label)}`;
  text.textContent = names.length > 1 ? `${names[label]} ${score.toFixed(2)}` : score.toFixed(2);
  element.append(text);
  return element;
}

function makeRow({ box: [x0, y0, x1, y1], score, label }) {
  const row = document.createElement("tr");
  const sides = [x0, y0, x1 - x0, y1 - y0].map((side) => side.toFixed(0));
  for (const text of [detector.about.class_names[label], score.toFixed(2), ...sides]) row.insertCell().textContent = text;
  return row;
}

/** Show the current photograph or frame: boxes, counts, times. */
function draw() {
  $("least").textContent = $("score").valueAsNumber.toFixed(2);
  if (!shown) return;
  const names = detector.about.class_names;
  const kept = chosen(shown);
  $("boxes").replaceChildren(...kept.map((one) => makeBox(one, shown)).reverse()); // the best one on top
  $("count").hidden = false;
  $("count").textContent = names.length > 1 ? counted(kept.length, "detection") : `${kept.length} × ${names[0]}`;
  $("photo").alt = `${shown.name}: ${$("count").textContent}`;
  $("rows").replaceChildren(...kept.map(makeRow));
  $("table").hidden = !kept.length;
  const counts = names.map(() => 0);
  for (const { score, label } of shown.found) if (score >= $("score").valueAsNumber) counts[label]++;
  $("names").querySelectorAll("b").forEach((count, label) => (count.textContent = counts[label] || ""));
  for (const [name, ms] of Object.entries(shown.ms)) $(name).textContent = milliseconds(ms);
  $("total").textContent = milliseconds(Object.values(shown.ms).reduce((a, b) => a + b));
  $("copy").disabled = false;
}

function show(entry) {
  if (video) stopCamera();
  shown = entry;
  $("photo").src = entry.address;
  $("caption").textContent = `${entry.name}, ${entry.width} × ${entry.height} pixels`;
  for (const [i, button] of [...$("strip").children].entries()) button.ariaPressed = String(entries[i] === entry);
  fit(entry);
  draw();
}

function fit({ width, height }) {
  $("view").style.setProperty("--shape", width / height);
  $("view").hidden = false;
  $("empty").hidden = true;
}

// --- photographs

async function addThumbnail(entry, file) {
  const canvas = document.createElement("canvas");
  const button = document.createElement("button");
  [canvas.width, canvas.height] = [Math.max(1, Math.round((128 * entry.width) / entry.height)), 128];
  button.ariaLabel = entry.name;
  button.onclick = () => show(entry);
  button.append(canvas);
  $("strip").append(button);
  const small = await createImageBitmap(file, { resizeHeight: 128, resizeQuality: "medium" });
  canvas.getContext("2d").drawImage(small, 0, 0, canvas.width, canvas.height);
  small.close();
}

async function addFile(file) {
  try {
    const entry = { name: file.name, address: URL.createObjectURL(file), ...(await detector.detect(file)) };
    entries.push(entry);
    await addThumbnail(entry, file);
    return entry;
  } catch (error) {
    complain(error.message);
  }
}

let queue = Promise.resolve();

function addFiles(files) {
  const all = [...files];
  if (!detector || !all.length) return;
  queue = queue.then(async () => {
    $("problems").replaceChildren();
    let first;
    for (const [i, file] of all.entries()) {
      say(all.length > 1 ? `Detecting in photograph ${i + 1} of ${all.length} …` : "Detecting …", i / all.length);
      const entry = await addFile(file);
      if (entry && !first) show((first = entry));
    }
    say("");
  });
}

// --- camera

const REFUSALS = {
  NotAllowedError: "The camera was refused: allow it beside the address of this page, and try again.",
  NotFoundError: "There is no camera: connect one, or choose photographs.",
  NotReadableError: "The camera gives no picture: close other programs that use it.",
};

async function startCamera() {
  $("problems").replaceChildren();
  if (!navigator.mediaDevices) return complain("The camera needs a page from https or from localhost: open it there.");
  let stream;
  $("camera").disabled = true; // while the browser asks for permission
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    return complain(REFUSALS[error.name] ?? `The camera does not start (${error.message}): choose photographs.`);
  } finally {
    $("camera").disabled = false;
  }
  video = $("video");
  video.srcObject = stream;
  await video.play();
  $("camera").textContent = "Stop the camera";
  $("photo").hidden = true;
  video.hidden = false;
  $("caption").textContent = "Camera";
  for (const button of $("strip").children) button.ariaPressed = "false";
  while (video) await detectFrame();
}

async function detectFrame() {
  try {
    const frame = await createImageBitmap(video);
    const { found, width, height, ms } = await detector.detect(frame);
    if (!video) return;
    shown = { name: "camera", found, width, height, ms };
    fit(shown);
    draw();
    await new Promise(requestAnimationFrame);
  } catch (error) {
    stopCamera();
    complain(error.message);
  }
}

function stopCamera() {
  for (const track of video.srcObject.getTracks()) track.stop();
  [video.srcObject, video.hidden, $("photo").hidden, video] = [null, true, false, undefined];
  $("camera").textContent = "Use the camera";
  const last = entries.at(-1);
  if (last) return show(last);
  shown = undefined;
  for (const name of ["view", "count", "table"]) $(name).hidden = true;
  $("empty").hidden = false;
  $("copy").disabled = true;
  $("caption").textContent = "";
}

// --- JSON

/** All photographs (or the frame) as a data set of COCO, as `msad predict` writes it. */
function asCoco() {
  const { class_names: names, category_ids: ids } = detector.about;
  const pictures = video ? [shown] : entries;
  const images = pictures.map(({ name, width, height }, i) => ({ id: i + 1, file_name: name, width, height }));
  const annotations = pictures.flatMap((picture, i) =>
    chosen(picture).map(({ box: [x0, y0, x1, y1], score, label }) => {
      const [w, h] = [x1 - x0, y1 - y0];
      return { image_id: i + 1, category_id: ids[label], bbox: [x0, y0, w, h], score, area: w * h, iscrowd: 0 };
    }),
  );
  return {
    images,
    categories: names.map((name, label) => ({ id: ids[label], name })),
    annotations: annotations.map((annotation, i) => ({ id: i + 1, ...annotation })),
  };
}

async function copy() {
  const button = $("copy");
  const text = JSON.stringify(asCoco(), null, 1);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    const link = document.createElement("a"); // a page without https may not write to the clipboard
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "results.json";
    link.click();
    button.textContent = "Saved as results.json";
  }
  setTimeout(() => (button.textContent = "Copy JSON"), 2000);
}

// --- the page

function listClasses({ class_names: names }) {
  $("classes").hidden = names.length < 2;
  const items = names.map((name, label) => {
    const [item, line, box] = ["li", "label", "input"].map((kind) => document.createElement(kind));
    Object.assign(box, { type: "checkbox", checked: true });
    box.onchange = () => (hidden[box.checked ? "delete" : "add"](label), draw());
    item.style.setProperty("--hue", hue(label));
    line.append(box, name, document.createElement("b"));
    item.append(line);
    return item;
  });
  $("names").replaceChildren(...items);
  const checkAll = (checked) => {
    for (const box of $("names").querySelectorAll("input")) box.checked = checked;
    names.forEach((_, label) => hidden[checked ? "delete" : "add"](label));
    draw();
  };
  $("all").onclick = () => checkAll(true);
  $("none").onclick = () => checkAll(false);
}

function step(by) {
  const place = entries.indexOf(shown) + by;
  if (entries[place]) show(entries[place]);
}

function listen() {
  $("choose").onclick = () => $("files").click();
  $("files").onchange = () => (addFiles($("files").files), ($("files").value = ""));
  $("camera").onclick = () => (video ? stopCamera() : startCamera());
  $("score").oninput = draw;
  $("copy").onclick = copy;
  document.onpaste = ({ clipboardData }) => addFiles(clipboardData.files);
  document.onkeydown = ({ key, target }) => {
    if (target.matches("input, summary")) return;
    if (key === "ArrowLeft") step(-1);
    if (key === "ArrowRight") step(1);
  };
  document.ondragover = (event) => (event.preventDefault(), $("stage").classList.add("over"));
  document.ondragleave = ({ relatedTarget }) => relatedTarget || $("stage").classList.remove("over");
  document.ondrop = (event) => {
    event.preventDefault();
    $("stage").classList.remove("over");
    addFiles(event.dataTransfer.files);
  };
}

async function start() {
  say("Loading …");
  try {
    detector = await Detector.load((done, all) =>
      say(done < all ? `Loading: ${megabytes(done)} of ${megabytes(all)} MB` : "Opening the network …", done / all),
    );
  } catch (error) {
    say("");
    return complain(error.message);
  }
  const { about, threads } = detector;
  document.title = $("title").textContent = about.title;
  $("model").textContent = `${about.role} of width ${about.width}, ${about.precision}`;
  $("threads").textContent = `${counted(threads, "thread")}${self.crossOriginIsolated ? "" : ", as this server does not send the headers that more of them need"}.`;
  Object.assign($("score"), { min: about.score_thresh, value: about.min_score });
  listClasses(about);
  listen();
  draw();
  for (const name of ["choose", "camera"]) $(name).disabled = false;
  say("");
}

start();
