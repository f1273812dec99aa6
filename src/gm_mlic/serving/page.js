"use strict";

const $ = (id) => document.getElementById(id);
const PREDICTED = 0.5, LISTED = 20;
let modelLabels = [], file = null, shown = null, requests = 0, result = null, chosen = null; // chosen: {label: i} or {instance: i}

function showMessage(text, busy = false) {
  $("message").textContent = text;
  $("message").className = busy ? "busy" : "";
}

function names() {
  return $("labels").value.split(/[\n,]/).map((name) => name.trim()).filter(Boolean);
}

function showLabels(list) {
  $("labels").value = list.join("\n");
  $("count").textContent = `(${list.length})`;
}

async function start() {
  const about = await (await fetch("model")).json();
  modelLabels = about.labels;
  showLabels(modelLabels);
  $("about").textContent = `${about.model} on instances of ${about.detector}; ${modelLabels.length} labels`;
}

async function predict() {
  if (file === null) return;
  await ready;
  showMessage("Predicting ...", true);
  if (names().length === 0) showLabels(modelLabels);
  const list = names();
  const query = new URLSearchParams(list.join("\n") === modelLabels.join("\n") ? [] : list.map((name) => ["label", name]));
  const photo = file, number = ++requests;
  try {
    const response = await fetch(`predict?${query}`, { method: "POST", body: photo });
    const answer = await response.json();
    if (number !== requests) return; // superseded by a newer request
    if (!response.ok) { clear(); if (photo !== shown) hidePhoto(); showMessage(answer.error); return; }
    result = answer;
    chosen = { label: 0 };
    showMessage("");
    $("count").textContent = `(${list.length})`;
    await showPhoto(photo);
    draw();
  } catch (error) {
    if (number === requests) showMessage("No response from the server: is gm-mlic serve still running?");
  }
}

function clear() {
  result = null;
  $("boxes").replaceChildren();
  $("found").replaceChildren();
  $("matchhead").textContent = "Matches";
  $("matches").replaceChildren();
}

async function showPhoto(blob) {
  const { width, height } = result;
  URL.revokeObjectURL($("photo").src);
  $("photo").src = URL.createObjectURL(blob);
  await $("photo").decode().catch(() => { // formats such as TIFF: show the boxes on a gray background
    const sheet = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"/>`;
    $("photo").src = `data:image/svg+xml,${encodeURIComponent(sheet)}`;
    showMessage("The browser cannot show this kind of file; only the boxes are shown.", true);
  });
  shown = blob;
  $("stage").style.setProperty("--aspect", width / height);
  $("stage").hidden = false;
  $("hint").hidden = true;
  $("drop").classList.add("full");
}

function hidePhoto() {
  shown = null;
  $("stage").hidden = true;
  $("hint").hidden = false;
  $("drop").classList.remove("full");
}

function entry(name, p, isChosen, act) {
  const item = document.createElement("li"), button = document.createElement("button");
  const label = document.createElement("span"), value = document.createElement("span");
  label.textContent = name;
  value.textContent = p.toFixed(2);
  value.className = "value";
  button.style.setProperty("--p", p);
  button.append(label, value);
  button.addEventListener("click", act);
  button.setAttribute("aria-pressed", String(isChosen));
  item.classList.toggle("chosen", isChosen);
  item.classList.toggle("unlikely", p < PREDICTED);
  item.append(button);
  return item;
}

function instanceName(i) {
  return `instance ${i}` + (result.detected[i] === null ? "" : `, detected as ${result.detected[i]}`);
}

function draw() {
  const { labels, probabilities, argmax_instance, match_probabilities, boxes } = result;
  const choose = (what) => () => { chosen = what; draw(); };
  $("found").replaceChildren(...labels.slice(0, LISTED).map(
    (name, c) => entry(name, probabilities[c], chosen.label === c, choose({ label: c }))));

  const svg = $("boxes");
  svg.setAttribute("viewBox", `0 0 ${result.width} ${result.height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const byArea = boxes.map((_, i) => i).sort((a, b) => area(boxes[b]) - area(boxes[a])); // draw small boxes last
  svg.replaceChildren(...byArea.map((i) => {
    const [x1, y1, x2, y2] = boxes[i];
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    for (const [key, value] of Object.entries(place)) rect.setAttribute(key, value);
    const highlighted = chosen.label === undefined ? chosen.instance === i : argmax_instance[chosen.label] === i;
    const p = chosen.label === undefined ? (highlighted ? 1 : 0) : match_probabilities[i][chosen.label] ?? 0;
    rect.classList.toggle("highlighted", highlighted);
    rect.style.opacity = highlighted ? 1 : 0.25 + 0.6 * p;
    rect.dataset.instance = i;
    rect.setAttribute("tabindex", "0");
    rect.setAttribute("role", "button");
    rect.setAttribute("aria-label", instanceName(i));
    const act = (event) => { event.stopPropagation(); chosen = { instance: i }; draw(); };
    rect.addEventListener("click", act);
    rect.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") act(event); });
    return rect;
  }));

  if (chosen.label !== undefined) {
    const c = chosen.label;
    $("matchhead").textContent = `Instances that match “${labels[c]}”`;
    const linked = boxes.map((_, i) => i).filter((i) => match_probabilities[i][c] !== null);
    const order = linked.sort((a, b) => match_probabilities[b][c] - match_probabilities[a][c]);
    $("matches").replaceChildren(...order.map(
      (i) => entry(instanceName(i), match_probabilities[i][c], argmax_instance[c] === i, choose({ instance: i }))));
  } else {
    const i = chosen.instance;
    $("matchhead").textContent = `Labels that ${instanceName(i)}, matches`;
    const linked = labels.map((_, c) => c).filter((c) => match_probabilities[i][c] !== null);
    const order = linked.sort((a, b) => match_probabilities[i][b] - match_probabilities[i][a]).slice(0, LISTED);
    $("matches").replaceChildren(...order.map(
      (c) => entry(labels[c], match_probabilities[i][c], argmax_instance[c] === i, choose({ label: c }))));
  }
}

function area([x1, y1, x2, y2]) { return (x2 - x1) * (y2 - y1); }

function take(files) {
  if (files.length === 0) return;
  file = files[0];
  predict();
}

$("drop").addEventListener("click", () => $("file").click());
$("drop").addEventListener("keydown", (event) => {
  if (event.target === $("drop") && (event.key === "Enter" || event.key === " ")) $("file").click();
});
$("file").addEventListener("change", () => { take($("file").files); $("file").value = ""; }); // allow the same file again
// Handle drops on the whole page; otherwise the browser would open the photo.
for (const kind of ["dragenter", "dragover"]) {
  window.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  window.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
}
window.addEventListener("drop", (event) => take(event.dataTransfer.files));
$("apply").addEventListener("click", predict);
$("reset").addEventListener("click", () => { showLabels(modelLabels); predict(); });
const ready = start().catch(() => showMessage("No response from the server: is gm-mlic serve still running?"));
