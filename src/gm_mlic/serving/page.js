"use strict";

const $ = (id) => document.getElementById(id);
const PREDICTED = 0.5, LISTED = 20;
let own = [], file = null, shown = null, asked = 0, result = null, chosen = null; // chosen: {label: i} or {instance: i}

function say(text, busy = false) {
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
  own = about.labels;
  showLabels(own);
  $("about").textContent = `${about.model} on instances of ${about.detector}; ${own.length} labels`;
}

async function predict() {
  if (file === null) return;
  await ready;
  say("Looking at the photo ...", true);
  if (names().length === 0) showLabels(own);
  const list = names();
  const query = new URLSearchParams(list.join("\n") === own.join("\n") ? [] : list.map((name) => ["label", name]));
  const photo = file, number = ++asked;
  try {
    const response = await fetch(`predict?${query}`, { method: "POST", body: photo });
    const answer = await response.json();
    if (number !== asked) return; // another photo, or other labels, were asked for meanwhile
    if (!response.ok) { clear(); if (photo !== shown) hidePhoto(); say(answer.error); return; }
    result = answer;
    chosen = { label: 0 };
    say("");
    $("count").textContent = `(${list.length})`;
    await showPhoto(photo);
    draw();
  } catch (error) {
    if (number === asked) say("The server does not answer: is gm-mlic serve still running?");
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
  await $("photo").decode().catch(() => { // TIFF and the like: their boxes on a grey sheet
    const sheet = `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}"/>`;
    $("photo").src = `data:image/svg+xml,${encodeURIComponent(sheet)}`;
    say("The browser cannot show this kind of file; the boxes stand where they are in the photo.", true);
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
  return `instance ${i}` + (result.detected[i] === null ? "" : `, seen as ${result.detected[i]}`);
}

function draw() {
  const { labels, probabilities, winners, matches, boxes } = result;
  const choose = (what) => () => { chosen = what; draw(); };
  $("found").replaceChildren(...labels.slice(0, LISTED).map(
    (name, c) => entry(name, probabilities[c], chosen.label === c, choose({ label: c }))));

  const svg = $("boxes");
  svg.setAttribute("viewBox", `0 0 ${result.width} ${result.height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const byArea = boxes.map((_, i) => i).sort((a, b) => area(boxes[b]) - area(boxes[a])); // small ones above large ones
  svg.replaceChildren(...byArea.map((i) => {
    const [x1, y1, x2, y2] = boxes[i];
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const place = { x: x1, y: y1, width: x2 - x1, height: y2 - y1 };
    for (const [key, value] of Object.entries(place)) rect.setAttribute(key, value);
    const won = chosen.label === undefined ? chosen.instance === i : winners[chosen.label] === i;
    const p = chosen.label === undefined ? (won ? 1 : 0) : matches[i][chosen.label] ?? 0;
    rect.classList.toggle("won", won);
    rect.style.opacity = won ? 1 : 0.25 + 0.6 * p;
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
    const joined = boxes.map((_, i) => i).filter((i) => matches[i][c] !== null);
    const order = joined.sort((a, b) => matches[b][c] - matches[a][c]);
    $("matches").replaceChildren(...order.map(
      (i) => entry(instanceName(i), matches[i][c], winners[c] === i, choose({ instance: i }))));
  } else {
    const i = chosen.instance;
    $("matchhead").textContent = `Labels that ${instanceName(i)}, matches`;
    const joined = labels.map((_, c) => c).filter((c) => matches[i][c] !== null);
    const order = joined.sort((a, b) => matches[i][b] - matches[i][a]).slice(0, LISTED);
    $("matches").replaceChildren(...order.map(
      (c) => entry(labels[c], matches[i][c], winners[c] === i, choose({ label: c }))));
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
$("file").addEventListener("change", () => { take($("file").files); $("file").value = ""; }); // the same one again, too
// Anywhere on the page: beside the frame, the browser would leave the page for the photo.
for (const kind of ["dragenter", "dragover"]) {
  window.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  window.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
}
window.addEventListener("drop", (event) => take(event.dataTransfer.files));
$("apply").addEventListener("click", predict);
$("reset").addEventListener("click", () => { showLabels(own); predict(); });
const ready = start().catch(() => say("The server does not answer: is gm-mlic serve still running?"));
