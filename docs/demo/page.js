import { colours, Explainer, PREPROCESSING } from "./explainer.js";

const $ = (id) => document.getElementById(id);
const say = (text) => { $("status").textContent = text; };
const site = await (await fetch("explainers.json")).json();
const weights = { path: site.weights, data: site.weights };

let explainer, bitmap, labels = site.labels;

function fill(select, entries, value) {
  select.replaceChildren(...entries.map(([key, text]) => new Option(text, key)));
  if (value !== undefined) select.value = value;
}

function methods() {
  return [...new Map(site.explainers.map((e) => [e.method, e.label]))];
}

function percentiles() {
  const qs = site.explainers.filter((e) => e.method === $("method").value && e.q !== null);
  fill($("q"), qs.map((e) => [e.q, e.q]), qs.at(-1)?.q);
  $("q").disabled = !qs.length;
}

async function choose() {
  const entry = site.explainers.find(
    (e) => e.method === $("method").value && (e.q === null || e.q === Number($("q").value)));
  explainer = await Explainer.load(entry.file, weights);
  await show();
}

/** The middle of the picture, in the model's size. */
function pixels() {
  const canvas = $("picture"), side = Math.min(bitmap.width, bitmap.height);
  Object.assign(canvas, { width: explainer.width, height: explainer.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (bitmap.width - side) / 2, (bitmap.height - side) / 2, side, side,
    0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

async function show() {
  if (!bitmap) return say("Choose a picture, or drop one.");
  const before = performance.now(), target = Number($("target").value || -1);
  const { scores, map } = await explainer.explain(pixels(), target, PREPROCESSING[$("range").value]);
  const best = scores.indexOf(Math.max(...scores)), name = (c) => labels?.[c] ?? `class ${c}`;
  const canvas = $("map");
  Object.assign(canvas, { width: explainer.width, height: explainer.height });
  canvas.getContext("2d").putImageData(
    new ImageData(colours(map), canvas.width, canvas.height), 0, 0);
  fill($("target"), [[-1, `predicted: ${name(best)}`],
    ...Array.from(scores, (s, c) => [c, `${name(c)} (score ${s.toFixed(2)})`])], target);
  say(`${name(target < 0 ? best : target)}, explained in ${Math.round(performance.now() - before)} ms`);
}

const attempt = (action) => async (event) => {
  try { await action(event); } catch (error) { say(`Not possible: ${error.message ?? error}`); }
};
const open = async (file) => { if (file) { bitmap = await createImageBitmap(file); await show(); } };

fill($("method"), methods());
fill($("range"), Object.keys(PREPROCESSING).map((k) => [k, k]), site.preprocessing);
percentiles();
$("file").onchange = attempt((event) => open(event.target.files[0]));
$("method").onchange = attempt(() => { percentiles(); return choose(); });
$("q").onchange = attempt(choose);
$("target").onchange = $("range").onchange = attempt(show);
$("own").onchange = attempt(async (event) => {
  const bytes = new Uint8Array(await event.target.files[0].arrayBuffer());
  [explainer, labels] = [await Explainer.load(bytes), null];
  $("target").replaceChildren();
  await show();
});
document.ondragover = (event) => { event.preventDefault(); document.body.classList.add("over"); };
document.ondragleave = () => document.body.classList.remove("over");
document.ondrop = attempt((event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  return open(event.dataTransfer.files[0]);
});
await attempt(choose)();
