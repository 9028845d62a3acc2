// What a stream held, read and weighed, step by step. The recording is described in kvsieve/files/recording_file.py.
//
//   load      the columns are unpacked, and of each token the step is found at which it came
//   View      answers what a token is at a step, for one head or for all of them together
//   show      one step: only what can be seen is looked at, so that it takes as long in a long text as in a short one
"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const recording = JSON.parse($("recording").textContent);
const tokens = recording.tokens;
const LEVELS = 5, MIB = 2 ** 20;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const count = (n) => Math.round(n).toLocaleString("en");
const made = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });

async function unpack(text, Kind) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Kind(await new Response(stream).arrayBuffer());
}

// The last index of `column`, which ascends, whose value is at most `value`; -1 if there is none.
function lastAtMost(column, value, lo = 0, hi = column.length) {
  while (lo < hi) {
    const mid = (lo + hi) >> 1;
    if (column[mid] <= value) lo = mid + 1; else hi = mid;
  }
  return lo - 1;
}

// ------------------------------------------------------------------------------------------------------------------- the recording

const steps = {};
let last = 0, birth;

async function load() {
  const kinds = { seen: Int32Array, held: Int32Array, bytes: Float64Array, full: Float64Array, seconds: Float32Array };
  for (const [name, kind] of Object.entries(kinds)) steps[name] = await unpack(recording.steps[name], kind);
  last = steps.seen.length - 1;
  birth = new Int32Array(tokens.length);
  for (let step = 0, token = 0; step <= last; step++) for (; token < steps.seen[step]; token++) birth[token] = step;
}

// What the heads of one layer hold; of all layers where heads are alike.
const holds = new Map();
async function unpackHeld(at) {
  if (!holds.has(at)) {
    const told = recording.holds[at], again = new Map();
    const left = await unpack(told.left, Int32Array), more = await unpack(told.again, Int32Array);
    for (let i = 0; i < more.length; i += 4) {
      const key = more[i] * tokens.length + more[i + 1];
      if (!again.has(key)) again.set(key, []);
      again.get(key).push(more[i + 2], more[i + 3]);
    }
    holds.set(at, { heads: told.heads, left, again, scores: told.scores && await unpackScores(told.scores, told.heads) });
  }
  return holds.get(at);
}

function isHeld(held, head, token, step) {
  const key = head * tokens.length + token, left = held.left[key];
  if (left < 0 || step < left) return true;
  const later = held.again.get(key);
  let now = false;
  for (let i = 0; later && i < later.length && later[i] <= step; i += 2) now = later[i + 1] === 1;
  return now;
}

// Scores sorted by head and token, so that those of one lie side by side, and the values that split all of them into equal parts.
async function unpackScores(told, heads) {
  const [head, step, position, score] = await Promise.all([unpack(told.head, Int32Array), unpack(told.step, Int32Array),
    unpack(told.position, Int32Array), unpack(told.score, Float32Array)]);
  const first = new Int32Array(heads * tokens.length + 1), order = new Int32Array(score.length);
  for (let i = 0; i < score.length; i++) first[head[i] * tokens.length + position[i] + 1]++;
  for (let i = 1; i < first.length; i++) first[i] += first[i - 1];
  const next = first.slice();
  for (let i = 0; i < score.length; i++) order[next[head[i] * tokens.length + position[i]]++] = i;
  const sorted = score.filter(Number.isFinite).sort();
  const edges = Array.from({ length: LEVELS - 1 }, (_, i) => sorted[Math.floor(sorted.length * (i + 1) / LEVELS)]);
  return { first, step: order.map((i) => step[i]), score: Float32Array.from(order, (i) => score[i]), edges };
}

function scoreOf(held, head, token, step) {
  if (!held.scores) return NaN;
  const key = head * tokens.length + token, { first } = held.scores;
  const at = recording.scores_at === "end" ? first[key + 1] - 1 : lastAtMost(held.scores.step, step, first[key], first[key + 1]);
  return at < first[key] ? NaN : held.scores.score[at];
}

const readLanes = new Map();
async function unpackReads(at) {
  if (!readLanes.has(at)) {
    const told = recording.reads.of[at];
    const [step, counts, ranges] = await Promise.all([told.step, told.count, told.ranges].map((c) => unpack(c, Int32Array)));
    const first = new Int32Array(counts.length + 1);
    for (let i = 0; i < counts.length; i++) {
      first[i + 1] = first[i] + 2 * Math.max(counts[i], 0);
      for (let j = first[i] + 1; j < first[i + 1]; j++) ranges[j] += ranges[j - 1]; // gaps and lengths become lo and hi
    }
    readLanes.set(at, { step, counts, ranges, first });
  }
  return readLanes.get(at);
}

// ------------------------------------------------------------------------------------------------------------------------ the view

const FUTURE = 0, GONE = 1, IDLE = 2, KEPT = 3, FETCHED = 9; // KEPT + level, FETCHED + level; level 0 is none
const NAMES = ["future", "gone", "idle", "kept", "kept s1", "kept s2", "kept s3", "kept s4", "kept s5",
  "fetched", "fetched s1", "fetched s2", "fetched s3", "fetched s4", "fetched s5"];

// What is looked at: one head of one layer, or all heads of one layer or of all.
class View {
  constructor(held, reads) { this.held = held; this.reads = reads; this.all = held.reduce((n, one) => n + one.heads.length, 0); }

  static async of(layer, head) {
    const held = [], reads = [];
    for (const [at, told] of recording.holds.entries()) {
      if (layer !== null && told.layer !== null && told.layer !== layer) continue;
      const one = await unpackHeld(at);
      held.push({ ...one, heads: head === null || told.layer === null ? [...Array(told.heads).keys()] : [head] });
    }
    for (const [at, told] of (recording.reads ? recording.reads.of : []).entries()) {
      if (layer !== null && told.layer !== layer) continue;
      if (head !== null && told.head !== null && told.head !== head) continue;
      reads.push(await unpackReads(at));
    }
    return new View(held, reads);
  }

  holding(token, step) {
    let n = 0;
    for (const one of this.held) for (const head of one.heads) n += isHeld(one, head, token, step);
    return n;
  }

  score(token, step) { return this.all === 1 ? scoreOf(this.held[0], this.held[0].heads[0], token, step) : NaN; }

  // How many lanes selected each token from `lo` to `hi`, and how many read everything.
  selected(step, lo, hi) {
    const found = new Int32Array(hi - lo + 1);
    let whole = 0;
    for (const lane of this.reads) {
      const at = lastAtMost(lane.step, step);
      if (at < 0 || lane.counts[at] < 0) { whole++; continue; }
      for (let i = lane.first[at]; i < lane.first[at + 1]; i += 2) {
        const a = Math.max(lane.ranges[i], lo), b = Math.min(lane.ranges[i + 1], hi);
        if (a < b) { found[a - lo]++; found[b - lo]--; }
      }
    }
    for (let i = 1; i < found.length; i++) found[i] += found[i - 1];
    return { found, whole };
  }

  // What each token from `lo` to `hi` is: one of the numbers above.
  codes(step, lo, hi) {
    const codes = new Uint8Array(hi - lo), seen = steps.seen[step], reads = recording.reads;
    const { found, whole } = this.reads.length ? this.selected(step, lo, hi) : { found: null, whole: 0 };
    const partly = this.reads.length - whole;
    const edges = this.all === 1 && this.held[0].scores ? this.held[0].scores.edges : null;
    for (let token = lo; token < hi; token++) {
      if (token >= seen) { codes[token - lo] = FUTURE; continue; }
      const holding = this.holding(token, step);
      if (!holding) { codes[token - lo] = GONE; continue; }
      if (partly) {
        const n = found[token - lo];
        const always = reads.first !== null && (token < reads.first || token >= seen - reads.newest);
        codes[token - lo] = n ? FETCHED + (partly > 1 ? Math.ceil(LEVELS * n / partly) : 0) : always ? KEPT : IDLE;
        continue;
      }
      let level = 0;
      if (this.all > 1) level = Math.ceil(LEVELS * holding / this.all);
      else if (edges) {
        const score = this.score(token, step);
        if (Number.isFinite(score)) for (level = 1; level < LEVELS && score >= edges[level - 1]; level++);
      }
      codes[token - lo] = KEPT + level;
    }
    return codes;
  }
}

// ------------------------------------------------------------------------------------------------------------------------ the text

const chunks = [], starts = [], near = new Set();
const HINT = "Click on a token, or press the left and right arrows in the text, to see what became of it.";
let view, now = 0, marked = -1;

// Blocks of the text, cut at ends of lines where there are some. The browser lays out only those that are near.
function layText() {
  const text = $("text"), all = document.createDocumentFragment();
  for (let lo = 0; lo < tokens.length;) {
    let hi = Math.min(lo + 120, tokens.length);
    while (hi < tokens.length && hi < lo + 400 && !tokens[hi - 1].endsWith("\n")) hi++;
    const words = tokens.slice(lo, hi).join("");
    const box = made("div", words, "chunk");
    const lines = words.split("\n").reduce((n, line) => n + Math.ceil((line.length + 1) / 100), 0);
    box.style.containIntrinsicBlockSize = `auto ${lines * 26}px`;
    chunks.push({ box, lo, hi, codes: null });
    starts.push(lo);
    box.classList.add("future");
    all.append(box);
    lo = hi;
  }
  text.append(all);
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chunk = chunks[entry.target.dataset.at];
      if (entry.isIntersecting) near.add(chunk); else near.delete(chunk);
      if (entry.isIntersecting) paint(chunk);
    }
    // What was laid out only now may have another height than was guessed.
    if ($("follow").checked) follow();
  }, { root: text, rootMargin: "200px 0px" });
  chunks.forEach((chunk, at) => { chunk.box.dataset.at = at; watch.observe(chunk.box); });
}

function spans(chunk) {
  const parts = document.createDocumentFragment();
  for (let token = chunk.lo; token < chunk.hi; token++) {
    const span = made("span", tokens[token]);
    span.dataset.token = token;
    parts.append(span);
  }
  chunk.box.replaceChildren(parts);
  chunk.codes = new Uint8Array(chunk.hi - chunk.lo).fill(255);
}

function paint(chunk) {
  if (!chunk.codes) spans(chunk);
  const codes = view.codes(now, chunk.lo, chunk.hi);
  for (let i = 0; i < codes.length; i++) {
    if (codes[i] === chunk.codes[i]) continue;
    const span = chunk.box.childNodes[i];
    span.className = NAMES[codes[i]] + (tokens[chunk.lo + i] === "" ? " part" : "") + (chunk.lo + i === marked ? " here" : "");
    chunk.codes[i] = codes[i];
  }
}

// Chunks that are not read yet are hidden, and keep their place: nothing moves when the text grows.
let grown = 0;
function grow(seen) {
  const until = lastAtMost(starts, seen - 1) + 1;
  for (let at = Math.min(grown, until); at < Math.max(grown, until); at++) chunks[at].box.classList.toggle("future", at >= until);
  grown = until;
}

// The newest token comes to lie low in the window, with room for what follows.
function follow() {
  const token = Math.max(steps.seen[now] - 1, 0), chunk = chunkOf(token), text = $("text");
  if (!chunk.codes) paint(chunk);
  const box = text.getBoundingClientRect(), at = chunk.box.childNodes[token - chunk.lo].getBoundingClientRect();
  const by = Math.round(at.bottom - box.top - .8 * box.height);
  if (by < 0 || by > 1) text.scrollTop += by;
}

const chunkOf = (token) => chunks[lastAtMost(starts, token)];

function mark(token) {
  const old = marked >= 0 && chunkOf(marked);
  if (old && old.codes) old.box.childNodes[marked - old.lo].classList.remove("here");
  marked = token;
  if (token < 0) { $("token").textContent = HINT; return; }
  const chunk = chunkOf(token);
  if (!chunk.codes) paint(chunk);
  chunk.box.childNodes[token - chunk.lo].classList.add("here");
  $("token").textContent = whatIs(token);
}

function whatIs(token) {
  const text = tokens[token] === "" ? "a part of the character that follows" : JSON.stringify(tokens[token]);
  if (token >= steps.seen[now]) return `Token ${count(token)}, ${text}: not read yet`;
  const holding = view.holding(token, now), code = view.codes(now, token, token + 1)[0], score = view.score(token, now);
  const said = [];
  if (!holding) said.push("evicted");
  else if (view.all > 1) said.push(`held by ${count(holding)} of ${count(view.all)} heads`);
  else said.push("held");
  if (code >= FETCHED) {
    const { found, whole } = view.selected(now, token, token + 1);
    said.push(`fetched by ${count(found[0])} of ${count(view.reads.length - whole)} ${readers()}`);
  } else if (code === IDLE) said.push("not read at this step");
  if (Number.isFinite(score)) said.push(`score ${score.toPrecision(4)}${recording.scores_at === "end" ? " at the end" : ""}`);
  if (view.all === 1) {
    const left = view.held[0].left[view.held[0].heads[0] * tokens.length + token];
    if (left >= 0) said.push(left <= now ? `since step ${count(left + 1)}` : `until step ${count(left + 1)}`);
  }
  return `Token ${count(token)}, ${text}: ${said.join(", ")}`;
}

const readers = () => (recording.reads.of.every((lane) => lane.head === null) ? "layers" : "heads");

// ------------------------------------------------------------------------------------------------------------------------ one step

let saying = 0;

const place = () => `token ${count(steps.seen[now])} of ${count(tokens.length)}`;
const stepNow = () => `step ${count(now + 1)} of ${count(last + 1)}`;
function holding() {
  const whose = recording.holds[0].layer === null ? "" : " by each head";
  return `${count(steps.held[now])} held${whose}, ${(steps.bytes[now] / MIB).toFixed(1)} MiB`;
}

function show(step) {
  now = Math.max(0, Math.min(last, step));
  const time = $("time");
  if (+time.value !== now) time.value = now;
  time.setAttribute("aria-valuetext", `${stepNow()}, ${place()}: ${holding()}`);
  grow(steps.seen[now]);
  near.forEach(paint);
  if ($("follow").checked) follow();
  $("now").replaceChildren(made("b", place()), made("span", `${holding()} · ${stepNow()}`));
  const share = last ? now / last : 0;
  document.querySelectorAll(".cursor").forEach((cursor) => { cursor.style.left = `${100 * share}%`; });
  if (marked >= 0) $("token").textContent = whatIs(marked);
  // A screen reader hears where the slider came to rest, not every step on the way.
  clearTimeout(saying);
  saying = setTimeout(() => {
    $("said").textContent = `${place()}: ${holding()}`;
    if ($("words").open) inWords();
  }, 500);
}

function inWords() {
  const kinds = view.reads.length ? ["Always read", "Evicted", "Fetched", "Held, and not read"] : ["Held", "Evicted"];
  const runs = kinds.map(() => []), seen = steps.seen[now], codes = view.codes(now, 0, seen);
  for (let token = 0; token < seen; token++) {
    const kind = codes[token] === GONE ? 1 : codes[token] >= FETCHED ? 2 : codes[token] === IDLE ? 3 : 0;
    const list = runs[kind], end = list[list.length - 1];
    if (end && end[1] === token) end[1]++; else list.push([token, token + 1]);
  }
  $("words-body").replaceChildren(...kinds.map((kind, i) => {
    const total = runs[i].reduce((n, [lo, hi]) => n + hi - lo, 0), shown = runs[i].slice(0, 100);
    const told = shown.map(([lo, hi]) => (hi - lo === 1 ? count(lo) : `${count(lo)} to ${count(hi - 1)}`)).join("; ");
    const more = runs[i].length > shown.length ? `; and ${count(runs[i].length - shown.length)} more ranges` : "";
    return made("p", `${kind}: ${total ? `${count(total)} tokens: ${told}${more}` : "none"}.`);
  }));
}

// ------------------------------------------------------------------------------------------------------------------------ pictures

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const told = (seconds) => (seconds < 1 ? `${(1000 * seconds).toPrecision(3)} ms` : `${seconds.toPrecision(3)} s`);

function canvas(id, width, height) {
  const element = $(id);
  element.width = Math.max(1, Math.round(width));
  element.height = Math.max(1, Math.round(height));
  return element.getContext("2d");
}

// Down: the text. Across: the steps. How many of the tokens of a place were held, and, above that, how many were fetched.
function drawMap() {
  const box = $("map").getBoundingClientRect();
  const width = Math.min(last + 1, Math.round(box.width)), height = Math.min(tokens.length, Math.round(box.height));
  const context = canvas("map", width, height);
  const column = (step) => (last ? Math.ceil(step * (width - 1) / last) : step > 0 ? 1 : 0);
  const at = (x) => (width > 1 ? Math.floor(x * last / (width - 1)) : 0);
  const row = (token) => Math.floor(token * height / tokens.length);
  const size = new Int32Array(height);
  const held = new Int32Array(height * (width + 1)), fetched = new Int32Array(height * width);
  for (let token = 0; token < tokens.length; token++) size[row(token)]++;
  for (const one of view.held) {
    for (const head of one.heads) {
      for (let token = 0; token < tokens.length; token++) {
        const line = row(token) * (width + 1), key = head * tokens.length + token, left = one.left[key];
        held[line + column(birth[token])]++;
        if (left >= 0) held[line + Math.min(column(Math.max(left, birth[token])), width)]--;
        const later = one.again.get(key);
        for (let i = 0; later && i < later.length; i += 2) held[line + column(later[i])] += later[i + 1] ? 1 : -1;
      }
    }
  }
  let partly = 0;
  for (const lane of view.reads) {
    for (let x = 0; x < width; x++) {
      const entry = lastAtMost(lane.step, at(x));
      if (entry < 0 || lane.counts[entry] < 0) continue;
      partly++;
      for (let i = lane.first[entry]; i < lane.first[entry + 1]; i += 2) {
        for (let y = row(lane.ranges[i]), end = Math.min(row(lane.ranges[i + 1] - 1), height - 1); y <= end; y++) fetched[y * width + x]++;
      }
    }
  }
  const blue = colour("--held").split(" ").map(Number), orange = colour("--read").split(" ").map(Number);
  const grey = colour("--other").split(" ").map(Number), image = context.createImageData(width, height);
  for (let y = 0; y < height; y++) {
    let sum = 0;
    for (let x = 0; x < width; x++) {
      sum += held[y * (width + 1) + x];
      const share = Math.min(1, sum / (size[y] * view.all)), n = fetched[y * width + x];
      const middle = (y + .5) * tokens.length / height, seen = steps.seen[at(x)], reads = recording.reads;
      const always = partly && reads.first !== null && (middle < reads.first || middle >= seen - reads.newest);
      const part = n ? .12 + .88 * Math.min(1, n / view.reads.length) ** .7 : 0;
      const rgb = n ? grey.map((value, i) => value + part * (orange[i] - value)) : partly && !always ? grey : blue;
      const alpha = n || (partly && !always) ? .35 * share + (1 - .35 * share) * part : share && .2 + .8 * share;
      image.data.set([...rgb, 255 * alpha], 4 * (y * width + x));
    }
  }
  context.putImageData(image, 0, 0);
  const meaning = view.reads.length ? "Orange: fetched; blue: always read; grey: held, and not read."
    : "The stronger the colour, the more of the tokens there are held.";
  $("map-says").textContent = `Down: the text, from token 0 to ${count(tokens.length - 1)}. Across: the steps. ${meaning}`;
}

function drawCurve(id, lines, most) {
  const box = $(id).getBoundingClientRect(), scale = devicePixelRatio || 1;
  const context = canvas(id, box.width * scale, box.height * scale), { width, height } = context.canvas, pad = 4 * scale;
  const x = (step) => (last ? step / last : .5) * width;
  for (const { values, dash, name } of lines) {
    context.beginPath();
    context.setLineDash(dash.map((n) => n * scale));
    context.lineWidth = 1.6 * scale;
    context.strokeStyle = colour(name);
    let pen = false, from = 0;
    while (from <= last) {
      // Of the steps within one pixel the highest is drawn.
      let to = from, peak = NaN;
      for (; to <= last && (to === from || x(to) - x(from) < scale); to++) {
        if (Number.isFinite(values[to]) && !(values[to] < peak)) peak = values[to];
      }
      if (Number.isFinite(peak)) {
        const y = height - pad - (height - 2 * pad) * Math.min(1, peak / (most || 1));
        if (pen) context.lineTo(x(from), y); else context.moveTo(x(from), y);
        if (last === 0) context.lineTo(x(from) + 6 * scale, y);
        pen = true;
      }
      from = to;
    }
    context.stroke();
  }
}

function drawCurves() {
  const peak = (values) => values.reduce((a, b) => (b > a ? b : a), 0);
  const bytes = peak(steps.bytes), full = steps.full[last], mib = (n) => `${(n / MIB).toFixed(1)} MiB`;
  const lines = [{ values: steps.full, dash: [3, 3], name: "--dim" }, { values: steps.bytes, dash: [], name: "--accent" }];
  drawCurve("bytes", lines, Math.max(bytes, full));
  $("bytes-says").textContent = `At most ${mib(bytes)} held (line); a full cache would end at ${mib(full)} (dashes).`;
  const known = steps.seconds.filter(Number.isFinite).sort();
  if (!known.length) { $("speed-says").textContent = "Not recorded."; return; }
  const middle = known[known.length >> 1], high = known[Math.floor((known.length - 1) * .99)];
  drawCurve("speed", [{ values: steps.seconds, dash: [], name: "--accent" }], high);
  $("speed-says").textContent = `${told(middle)} a token in the middle step, up to ${told(high)} (99 of 100 steps).`;
}

function curveTable() {
  if ($("numbers-body").firstChild) return;
  const table = made("table"), head = made("thead"), body = made("tbody"), names = ["step", "tokens seen", "held", "MiB", "ms a token"];
  head.append(made("tr"));
  for (const name of names) head.firstChild.append(Object.assign(made("th", name), { scope: "col" }));
  const rows = Math.min(last + 1, 40);
  for (let i = 0; i < rows; i++) {
    const step = rows > 1 ? Math.round(i * last / (rows - 1)) : 0, line = made("tr"), ms = steps.seconds[step] * 1000;
    line.append(Object.assign(made("th", count(step + 1)), { scope: "row" }));
    const cells = [count(steps.seen[step]), count(steps.held[step]), (steps.bytes[step] / MIB).toFixed(1)];
    line.append(...[...cells, Number.isFinite(ms) ? ms.toFixed(1) : "none"].map((cell) => made("td", cell)));
    body.append(line);
  }
  table.append(made("caption", rows <= last ? `${rows} of ${count(last + 1)} steps` : "every step"), head, body);
  $("numbers-body").append(table);
}

function drawLegend() {
  const rows = [];
  const sample = (name, text) => made("span", text, `sample ${name}`);
  const levels = (kind, text) => rows.push([...Array(LEVELS)].map((_, i) => sample(`${kind} s${i + 1}`, `${i + 1}`)).concat(text));
  if (view.reads.length) {
    if (view.reads.length > 1) levels("fetched", ` fetched, by few (1) to all (5) of ${count(view.reads.length)} ${readers()}`);
    else rows.push([sample("fetched", "sea"), " fetched: selected and read at this step"]);
    const { first, newest } = recording.reads;
    rows.push([sample("kept", "sea"), first === null ? " read" : ` always read: the first ${count(first)} and the newest ${count(newest)}`]);
    rows.push([sample("idle", "sea"), " held, and not read at this step"]);
  } else if (view.all > 1) levels("kept", ` held, by few (1) to all (5) of ${count(view.all)} heads`);
  else if (view.held[0].scores) {
    levels("kept", ` held, from a low (1) to a high (5) score${recording.scores_at === "end" ? " (that of the end)" : ""}`);
    rows.push([sample("kept", "sea"), " held, without a score"]);
  } else rows.push([sample("kept", "sea"), " held"]);
  const evicts = view.held.some((one) => one.left.some((step) => step >= 0));
  if (evicts) rows.push([sample("gone", "sea"), view.all > 1 ? " evicted by all of them" : " evicted"]);
  if (tokens.includes("")) rows.push([sample("kept part", ""), " a part of the character that follows"]);
  $("legend").replaceChildren(...rows.map((parts) => { const row = made("li"); row.append(...parts); return row; }));
}

// ----------------------------------------------------------------------------------------------------------------------- the controls

const chosen = (id) => ($(id).value === "" ? null : +$(id).value);

function options() {
  const lanes = [...recording.holds, ...(recording.reads ? recording.reads.of : [])].filter((one) => one.layer !== null);
  const layers = [...new Set(lanes.map((one) => one.layer))].sort((a, b) => a - b);
  const heads = Math.max(0, ...lanes.map((one) => (one.heads ? one.heads : one.head === null ? 0 : one.head + 1)));
  const fill = (id, values, all) => {
    const told = [["", all], ...values.map((value) => [value, `${value}`])];
    $(id).replaceChildren(...told.map(([value, text]) => Object.assign(made("option", text), { value })));
    $(`of-${id}`).hidden = !values.length;
  };
  fill("layer", layers, "all");
  fill("head", [...Array(heads).keys()], "all");
}

async function look() {
  // One head of all layers would be many heads that have nothing in common.
  $("head").disabled = chosen("layer") === null;
  if ($("head").disabled) $("head").value = "";
  view = await View.of(chosen("layer"), chosen("head"));
  for (const chunk of chunks) if (chunk.codes) chunk.codes.fill(255);
  drawMap();
  drawLegend();
  show(now);
}

function draw() { drawMap(); drawCurves(); }

let playing = 0;
function play(on) {
  clearInterval(playing);
  playing = 0;
  $("play").textContent = on ? "Pause" : "Play";
  if (!on) return;
  if (now === last) show(0);
  // All of it in about twenty seconds; where motion is unwelcome in few, larger steps.
  const rate = calm.matches ? 2 : 20, by = Math.max(1, Math.round((last + 1) / (20 * rate)));
  playing = setInterval(() => { show(now + by); if (now === last) play(false); }, 1000 / rate);
}

function listen() {
  $("time").addEventListener("input", () => { play(false); show(+$("time").value); });
  $("back").addEventListener("click", () => { play(false); show(now - 1); });
  $("on").addEventListener("click", () => { play(false); show(now + 1); });
  $("play").addEventListener("click", () => play(!playing));
  $("follow").addEventListener("change", () => show(now));
  for (const id of ["layer", "head"]) $(id).addEventListener("change", look);
  $("words").addEventListener("toggle", () => { if ($("words").open) inWords(); });
  $("numbers").addEventListener("toggle", curveTable);
  $("text").addEventListener("click", (event) => {
    const { token } = event.target.dataset;
    if (token !== undefined) mark(+token);
  });
  // Who scrolls wants to look elsewhere.
  const scrolls = ["ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End", " "];
  const stay = () => { $("follow").checked = false; };
  for (const kind of ["wheel", "touchmove"]) $("text").addEventListener(kind, stay, { passive: true });
  $("text").addEventListener("pointerdown", (event) => { if (event.target === $("text")) stay(); });
  $("text").addEventListener("keydown", (event) => { if (scrolls.includes(event.key)) stay(); });
  $("text").addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") mark(-1);
    if (!by) return;
    event.preventDefault();
    $("follow").checked = false;
    const first = marked < 0 ? firstVisible() : marked + by;
    mark(Math.max(0, Math.min(steps.seen[now] - 1, first)));
    const chunk = chunkOf(marked);
    chunk.box.childNodes[marked - chunk.lo].scrollIntoView({ block: "nearest" });
  });
  $("map").addEventListener("click", (event) => {
    const box = $("map").getBoundingClientRect();
    play(false);
    $("follow").checked = false;
    show(Math.round((event.clientX - box.left) / box.width * last));
    const token = Math.floor((event.clientY - box.top) / box.height * tokens.length);
    jump(Math.max(0, Math.min(steps.seen[now] - 1, token)));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let resizing = 0;
  addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(draw, 100); });
}

function jump(token) {
  mark(token);
  const chunk = chunkOf(token);
  chunk.box.childNodes[token - chunk.lo].scrollIntoView({ block: "center" });
}

function firstVisible() {
  const top = $("text").getBoundingClientRect().top;
  for (const chunk of chunks) {
    if (chunk.box.getBoundingClientRect().bottom <= top) continue;
    if (!chunk.codes) paint(chunk);
    for (let i = 0; i < chunk.hi - chunk.lo; i++) if (chunk.box.childNodes[i].getBoundingClientRect().bottom > top + 4) return chunk.lo + i;
  }
  return 0;
}

async function begin() {
  $("policy").textContent = recording.policy;
  $("about").textContent = `${recording.model}, backend ${recording.backend}, recorded ${recording.date}`;
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old for this page: it lacks DecompressionStream");
  await load();
  $("time").max = last;
  $("last").textContent = `step ${count(last + 1)}`;
  now = last;
  view = await View.of(null, null);
  layText();
  mark(-1);
  options();
  listen();
  await look();
  drawCurves();
  document.documentElement.dataset.ready = "yes";
}

begin().catch((error) => {
  $("about").textContent = `This page cannot be shown: ${error.message}`;
  document.documentElement.dataset.ready = "no";
  throw error;
});
})();
