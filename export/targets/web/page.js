// The page: from a file through boxes and classes to sounds that can be heard, seen and kept.

import { BoxEditor } from "./boxes.js";
import { openVideo, seek, timelines } from "./frames.js";
import { Live, openMicrophone } from "./live.js";
import { LivePanel } from "./live_panel.js";
import { Local } from "./local.js";
import { decode } from "./media.js";
import { clock, listenTo, Mixer } from "./mixer.js";
import { Player } from "./player.js";
import { draw } from "./picture.js";
import { boxAt, setBox, upTo, WHOLE } from "./track.js";

/** @typedef {import("./bundle.js").Manifest} Manifest */
/** @typedef {import("./track.js").Track} BoxTrack */
/** @typedef {import("./worker.js").Mixture} Mixture */
/** @typedef {import("./worker.js").Track} Track */
/** @typedef {{ classId: number, track: BoxTrack }} Asked */
/** @typedef {{ tracks: Track[], presence: number[] | null, alike: number[][], seconds: number }} Result sources, then the
 *   residual; `alike`: the correlation of each two sources, the later one's row first, and of each with the recording */
/** @typedef {{ file: File, mixture: Mixture, whole: Track, video: HTMLVideoElement | null, address: string, id: string,
 *   pictures: boolean }} Recording */

/** @template {HTMLElement} T @param {string} id @returns {T} */
const byId = (id) => /** @type {T} */ (document.getElementById(id));
/** @param {string} tag @param {Record<string, string>} [attributes] @param {string} [text] */
function make(tag, attributes = {}, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}
/** A class name as people read it. @param {string} name */
const pretty = (name) => name.replaceAll("_", " ");
// as avsep separate says it: two sources of more correlation are nearly the same sound, and a source whose level is so
// near to the recording's, and that sounds like it, is the recording
const ALIKE = 0.95;
const UNSEPARATED_DB = 0.5;
const local = Local.find();

// ---------------------------------------------------------------- the worker

/** @type {Worker} */
let worker;
/** @type {Map<number, { resolve: (value: any) => void, reject: (error: Error) => void }>} */
const waiting = new Map();
let count = 0;
let stopped = false;

/** @param {string} type @param {object} [asked] @param {Transferable[]} [transfer] @returns {Promise<any>} */
function ask(type, asked = {}, transfer = []) {
  count += 1;
  const id = count;
  worker.postMessage({ ...asked, type, id }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

function startWorker() {
  worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  worker.addEventListener("message", ({ data }) => {
    if (data.type === "progress") {
      progress(data.text, data.done, data.total);
      return;
    }
    if (data.type === "live") {
      if (live) live.stop(data.message);
      else failedEarly = data.message; // while it is being opened
      return;
    }
    const asked = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.type === "done") asked?.resolve(data.result);
    else asked?.reject(new Error(data.message));
  });
  worker.addEventListener("error", (event) => {
    for (const { reject } of waiting.values()) reject(new Error(event.message || "the worker cannot be started"));
    waiting.clear();
    live?.stop(event.message || "the worker has failed: reload the page");
  });
}

// ---------------------------------------------------------------- what the page says

/** @param {string} text @param {number} done @param {number} total */
function progress(text, done, total) {
  const bar = byId("bar");
  const share = total ? done / total : 0;
  /** @type {HTMLProgressElement} */ (bar).value = share;
  const doing = `${text[0].toUpperCase()}${text.slice(1)} …`;
  if (byId("doing").textContent !== doing) byId("doing").textContent = doing; // else it would be read out at every step
  bar.title = `${Math.round(100 * share)} %`;
}

/** @param {string} [message] */
function complain(message = "") {
  const alert = byId("alert");
  alert.hidden = !message;
  // a name of a file stays as it is
  const first = /^\S*\.\S/.test(message) ? message.slice(0, 1) : message.slice(0, 1).toUpperCase();
  alert.textContent = message ? `${first}${message.slice(1)}${/[.!?]$/.test(message) ? "" : "."}` : "";
  if (message) alert.scrollIntoView({ block: "nearest" });
}

/** Do something that takes a while: with a bar and a button to stop; a mistake is told in a line.
 * @param {string} text @param {() => Promise<void>} work */
async function busy(text, work) {
  complain();
  stopped = false;
  progress(text, 0, 1);
  byId("work").hidden = false;
  byId("file").toggleAttribute("disabled", true);
  byId("go").toggleAttribute("disabled", true);
  byId("listen").toggleAttribute("disabled", true);
  byId("mic").toggleAttribute("disabled", true);
  for (const name of ["liveplay", "buffering"]) byId(name).toggleAttribute("disabled", true); // one start at a time
  try {
    await work();
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    if (!stopped) complain(message);
  } finally {
    byId("work").hidden = true;
    byId("file").toggleAttribute("disabled", !manifest);
    byId("go").toggleAttribute("disabled", false);
    byId("listen").toggleAttribute("disabled", false);
    byId("mic").toggleAttribute("disabled", !facts.unseen);
    for (const name of ["liveplay", "buffering"]) byId(name).toggleAttribute("disabled", false);
  }
}

// ---------------------------------------------------------------- the separator

/** @type {Manifest | null} */
let manifest = null;
/** The separator's facts that the page asks for often. */
let facts = { least: 1, most: 64, unseen: false, byName: false, sees: false, moves: false, browser: true, causal: false };

async function load() {
  const engine = byId("engine");
  startWorker();
  byId("work").hidden = false;
  byId("stop").hidden = true;
  try {
    const wishes = new URLSearchParams(location.search);
  const wanted = wishes.get("backend") ?? "auto";
  const threads = Number(wishes.get("threads")) || 0;
    if (local && !local.browser) {
      manifest = await (await fetch("bundle/manifest.json")).json();
      await ask("describe", { manifest });
      engine.textContent = `Ready: ${local.engine}, on this computer.`;
      facts.browser = false;
    } else {
      const opened = await ask("open", { bundle: "bundle/", backend: wanted, threads });
      manifest = opened.manifest;
      const together = opened.threads > 1 ? `, ${opened.threads} threads` : "";
      const where = opened.backend === "webgpu" ? "WebGPU" : `WebAssembly${together}`;
      engine.textContent =
        `Verified: ${opened.checked} files have their SHA-256, and the graphs compute what they should on ${where} ` +
        `(within ${opened.worst.toExponential(1)}).${opened.notes.map((/** @type {string} */ n) => ` ${n}.`).join("")}`;
    }
    engine.classList.add("ready");
    learn(/** @type {Manifest} */ (manifest));
  } catch (error) {
    engine.classList.add("failed");
    engine.textContent = "The separator cannot be used.";
    complain(/** @type {Error} */ (error).message);
  } finally {
    byId("work").hidden = true;
    byId("stop").hidden = false;
    byId("file").toggleAttribute("disabled", !manifest);
  }
}

/** @param {Manifest} found */
function learn(found) {
  if (!found.classes.length) found.classes = Array.from({ length: found.separator.num_classes }, (_, k) => String(k));
  const graph = found.graphs.find((g) => g.kind === "separator" || g.kind === "stream") ?? found.graphs[0];
  const names = graph.inputs.map((tensor) => tensor.name);
  const sources = graph.inputs.find((tensor) => tensor.name === "class_ids")?.shape[1];
  if (found.independent_sources === false) {
    const most = graph.profiles.find((p) => "class_ids" in p)?.class_ids.max[1] ?? 64;
    facts.least = typeof sources === "number" ? sources : 1;
    facts.most = typeof sources === "number" ? sources : most;
  }
  facts.unseen = names.includes("seen") || found.visual.length === 0;
  facts.byName = facts.unseen && found.plan?.by_name === true;
  facts.sees = found.visual.length > 0 && (found.visual.every((v) => v.graph !== null) || local !== null);
  facts.causal = graph.kind === "stream" && facts.browser;
  byId("micbar").hidden = !facts.causal;
  byId("mic").toggleAttribute("disabled", !facts.unseen);
  if (!facts.unseen) byId("micnote").textContent = "This separator must see each source, and takes no microphone alone: choose a video.";
  facts.moves = facts.sees && found.visual.some((v) => v.role === "motion");
  const classes = found.classes.map(pretty).join(", ");
  const kind = (found.channels ?? 1) === 1 ? "mono" : (found.channels ?? 1) === 2 ? "mono or stereo" : `mono or ${found.channels} channels`;
  byId("foot").textContent =
    `This separator knows ${classes}. It works at ${found.sample_rate_hz.toLocaleString("en")} Hz, ${kind}. ` +
    (found.weights_licence ? `Its weights' licence: ${found.weights_licence}. ` : "") +
    "Licences: avsep MIT; ONNX Runtime MIT.";
}

// ---------------------------------------------------------------- a recording

/** @type {Recording | null} */
let recording = null;
/** @type {Asked[]} */
let asked = [];
/** @type {BoxEditor} */
let editor;

/** @param {File} file */
const choose = (file) => busy(`reading ${file.name}`, async () => {
  close();
  if (!file.size) throw new Error(`${file.name} is empty (0 bytes): record or copy it again`);
  const rate = /** @type {Manifest} */ (manifest).sample_rate_hz;
  /** @type {Mixture | null} */
  let mixture = await ask("readFile", { file });
  let [note, id, pictures] = ["", "", false];
  if (!mixture) {
    try {
      const sound = await decode(file);
      if (stopped) throw new Error("stopped");
      if (!sound.stated) note = "Its rate is not stated: it was decoded at 48,000 Hz.";
      mixture = await ask("readDecoded", { name: file.name, channels: sound.channels, rate: sound.rate });
    } catch (error) {
      if (!local || stopped) throw error;
      id = await local.upload(file);
      mixture = await ask("readFile", { file: await local.sound(id, file.name) });
    }
  }
  if (!mixture) throw new Error(`${file.name} has samples of a kind that is not read here: convert it to WAV`);
  const whole = await ask("look", { mixture });
  const address = URL.createObjectURL(file);
  const video = await openVideo(address);
  pictures = video !== null;
  if (!video && local && facts.sees) {
    id ||= await local.upload(file);
    pictures = await local.hasPictures(id);
  }
  if (!pictures && !facts.unseen) {
    URL.revokeObjectURL(address);
    throw new Error(`this separator needs video frames, and ${file.name} has none that can be seen here`);
  }
  recording = { file, mixture, whole, video, address, id, pictures };
  byId("title").textContent = file.name;
  const seconds = mixture.total / rate;
  const kind = mixture.channels === 1 ? "mono" : mixture.channels === 2 ? "stereo" : `${mixture.channels} channels`;
  byId("facts").textContent = `${clock(seconds)}, ${kind}, separated at ${rate.toLocaleString("en")} Hz. ${mixture.note} ${note}`.trim();
  setUp(recording);
});

function close() {
  live?.stop();
  mixer?.close();
  mixer = null;
  if (recording) URL.revokeObjectURL(recording.address);
  recording = null;
  for (const id of ["setup", "live", "result"]) byId(id).hidden = true;
  byId("watch").replaceChildren();
  byId("stage").querySelector("video")?.remove();
}

/** Ask for the sources of a recording, or of what the microphone will hear.
 * @param {{ video: HTMLVideoElement | null, pictures: boolean }} of */
function setUp({ video, pictures }) {
  const known = /** @type {Manifest} */ (manifest).classes;
  const kept = asked.length >= facts.least && asked.length <= facts.most ? asked.length : Math.min(facts.most, Math.max(facts.least, 2));
  asked = Array.from({ length: Math.min(kept, Math.max(known.length, facts.least)) }, (_, n) => ({
    classId: asked[n]?.classId ?? n % known.length,
    track: [{ time: 0, box: WHOLE }],
  }));
  byId("setup").hidden = false;
  byId("drop").classList.add("small");
  const sees = facts.sees && pictures;
  byId("sight").hidden = !(sees && video) && !(sees && local);
  byId("stage").hidden = byId("timebar").hidden = byId("boxhelp").hidden = !video;
  byId("setup").querySelector(".halves")?.classList.toggle("alone", byId("sight").hidden);
  byId("look").parentElement?.toggleAttribute("hidden", !facts.unseen);
  look(!facts.byName);
  byId("find").hidden = !(local?.detector && sees);
  byId("go").hidden = !recording;
  byId("where").hidden = !(recording && local?.browser);
  byId("listen").hidden = !facts.causal;
  if (video && !byId("sight").hidden) {
    byId("stage").classList.toggle("wide", video.videoWidth >= video.videoHeight);
    byId("stage").prepend(video);
    const scrub = /** @type {HTMLInputElement} */ (byId("scrub"));
    scrub.max = String(Math.max(0.1, (Number.isFinite(video.duration) ? video.duration : 0) - 0.05));
    scrub.value = "0";
    byId("second").textContent = "0.0 s";
  }
  showSources();
}

/** The names that the sources go by: those of their classes, with numbers where two are of one. */
function names() {
  const known = /** @type {Manifest} */ (manifest).classes;
  return asked.map(({ classId }, n) => {
    const alike = asked.filter((other) => other.classId === classId).length > 1;
    const number = asked.slice(0, n + 1).filter((other) => other.classId === classId).length;
    return alike ? `${known[classId]} ${number}` : known[classId];
  });
}

function showSources() {
  const known = /** @type {Manifest} */ (manifest).classes;
  const rows = asked.map((source, n) => {
    const row = make("div", { class: "source" });
    row.style.setProperty("--mine", `var(--c${n % 6})`);
    const select = /** @type {HTMLSelectElement} */ (make("select", { "aria-label": `Class of source ${n + 1}` }));
    known.forEach((name, k) => select.append(new Option(pretty(name), String(k), false, k === source.classId)));
    select.addEventListener("change", () => {
      source.classId = Number(select.value);
      showBoxes();
    });
    row.append(make("span", { class: "dot", "aria-hidden": "true" }), select);
    if (asked.length > facts.least) {
      const remove = make("button", { type: "button", class: "quiet", "aria-label": `Remove source ${n + 1}` }, "Remove");
      remove.addEventListener("click", () => {
        asked.splice(n, 1);
        showSources();
      });
      row.append(remove);
    }
    return row;
  });
  byId("sources").replaceChildren(...rows);
  byId("more").hidden = asked.length >= facts.most;
  byId("counts").textContent =
    facts.least === facts.most ? `This separator tells ${facts.least} sources apart: choose a class for each.` : "Choose a class for each source.";
  showBoxes();
}

/** Whether the separator is shown the pictures; drawing boxes says that it is. @param {boolean} shown */
const look = (shown) => {
  /** @type {HTMLInputElement} */ (byId("look")).checked = shown;
};

const now = () => Number(/** @type {HTMLInputElement} */ (byId("scrub")).value);

function showBoxes() {
  if (!byId("stage").hidden) editor.show(names().map(pretty), asked.map(({ track }) => boxAt(track, now())));
}

/** Take boxes as `avsep separate` writes and reads them: by second, of each source by its name or class.
 * @param {File} file */
const readBoxes = (file) => busy(`reading ${file.name}`, async () => {
  if (!recording || byId("stage").hidden) throw new Error(`${file.name} holds boxes: choose their video first`);
  /** @type {Record<string, Record<string, number[]>>} */
  let seconds;
  try {
    seconds = JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name} is not valid JSON`);
  }
  const form = '{"0": {"violin": [left, top, right, bottom]}, ...}';
  const own = names();
  /** @type {BoxTrack[]} */
  const found = own.map(() => []);
  for (const [second, boxes] of Object.entries(seconds ?? {})) {
    for (const [name, box] of Object.entries(boxes ?? {})) {
      const fits = Array.isArray(box) && box.length === 4 && box.every((v) => Number.isFinite(v) && v >= -0.05 && v <= 1.05);
      if (!fits || !(Number(second) >= 0)) throw new Error(`${file.name} holds no boxes: write ${form}`);
      const [l, t, r, b] = box.map((v) => Math.max(0, Math.min(1, v)));
      if (r <= l || b <= t) throw new Error(`${file.name}: the box of ${name} at ${second} s is empty`);
      const n = own.indexOf(name);
      if (n >= 0) found[n].push({ time: Number(second), box: [l, t, r, b] });
    }
  }
  if (!found.some((track) => track.length)) throw new Error(`${file.name} has no box of ${own.map(pretty).join(" or ")}`);
  found.forEach((track, n) => {
    if (track.length) asked[n].track = track.sort((a, b) => a.time - b.time);
  });
  look(true);
  showBoxes();
});

// ---------------------------------------------------------------- separating

/** Whether pictures are shown to the separator. @param {boolean} pictures there are any @param {boolean} inPython */
function looksAt(pictures, inPython) {
  const all = /** @type {Manifest} */ (manifest).visual.every((v) => v.graph !== null);
  const canLook = inPython || all; // stored features are Python's to extract
  const wanted = !facts.unseen || /** @type {HTMLInputElement} */ (byId("look")).checked;
  return facts.sees && pictures && canLook && wanted;
}

/** Throws where nothing tells two sources apart. @param {boolean} looks */
function checkClasses(looks) {
  const own = names();
  for (const [n, { classId }] of asked.entries()) {
    const other = asked.findIndex((one) => one.classId === classId);
    if (other === n) continue;
    const both = `${pretty(own[other])} and ${pretty(own[n])} are of one class`;
    if (!looks || !facts.moves) {
      throw new Error(`${both}, and nothing moving is seen of them, which alone tells them apart: choose two classes`);
    }
    if (JSON.stringify(asked[other].track) === JSON.stringify(asked[n].track)) {
      throw new Error(`${both}, and both are shown the same picture: draw a box for each`);
    }
  }
}

/** What is seen of each source of a recording. @param {Recording} chosen
 * @param {{ name: string, track: BoxTrack }[]} sources @param {boolean} looks
 * @returns {Promise<(import("./timeline.js").Timeline | null)[]>} */
async function seenOf(chosen, sources, looks) {
  const found = /** @type {Manifest} */ (manifest);
  if (looks) {
    const { file, mixture, video, address } = chosen;
    const seconds = mixture.total / found.sample_rate_hz;
    if (video) return timelines(address, seconds, found, sources, (d, t) => progress("looking at the video", d, t), () => stopped);
    if (local) return local.frames((chosen.id ||= await local.upload(file)), sources);
  }
  return sources.map(() => null);
}

const separate = () => busy("looking at the video", async () => {
  const chosen = /** @type {Recording} */ (recording);
  const { file, mixture, pictures } = chosen;
  const found = /** @type {Manifest} */ (manifest);
  const own = names();
  const inPython = local !== null && /** @type {HTMLSelectElement} */ (byId("runs")).value === "python";
  const looks = looksAt(pictures, inPython);
  checkClasses(looks);
  live?.stop();
  mixer?.close();
  mixer = null;
  byId("result").hidden = true;
  const sources = own.map((name, n) => ({ name, track: asked[n].track }));
  /** @type {Result} */
  let result;
  if (inPython) {
    chosen.id ||= await local.upload(file);
    const made = await local.separate(
      chosen.id,
      sources.map((source, n) => ({ ...source, class: found.classes[asked[n].classId] })),
      looks,
      mixture.channels,
      progress,
      () => stopped,
    );
    const tracks = [];
    for (const sound of made.sounds) tracks.push(await ask("look", { mixture: await ask("readFile", { file: sound, quiet: true }) }));
    result = { tracks, presence: made.presence, alike: made.alike, seconds: made.seconds };
  } else {
    const seen = await seenOf(chosen, sources, looks);
    result = await ask("separate", { mixture, sources: asked.map(({ classId }, n) => ({ classId, timeline: seen[n] })) });
  }
  show(own, result, looks);
});

// ---------------------------------------------------------------- live

/** @type {Live | null} */
let live = null;
/** What the worker said of a stream that was still being opened. */
let failedEarly = "";

/** Hear the sources of the recording, or of the microphone, as they sound. */
const listenLive = () => busy(recording ? "looking at the video" : "opening the microphone", async () => {
  const chosen = recording;
  const found = /** @type {Manifest} */ (manifest);
  const own = names();
  const looks = chosen !== null && looksAt(chosen.pictures, false);
  checkClasses(looks);
  if (chosen && chosen.mixture.channels > 2) {
    throw new Error(`one hears one or two channels live, and the recording has ${chosen.mixture.channels}: separate it instead`);
  }
  live?.stop();
  mixer?.player.pause();
  mixer?.tick();
  const microphone = chosen ? null : await openMicrophone(found.channels ?? 1);
  const heard = microphone?.getAudioTracks()[0].getSettings().channelCount;
  const tracks = own.map((name, n) => ({ name, track: asked[n].track }));
  const seen = chosen ? await seenOf(chosen, tracks, looks) : own.map(() => null);
  /** @type {LivePanel | null} */
  let panel = null;
  /** @type {import("./live.js").Wishes} */
  const wishes = {
    ask,
    rate: found.sample_rate_hz,
    channels: chosen ? chosen.mixture.channels : heard === found.channels ? (found.channels ?? 1) : 1,
    sources: asked.map(({ classId }, n) => ({ classId, timeline: seen[n] })),
    total: chosen?.mixture.total ?? 0,
    bufferingMs: Number(/** @type {HTMLSelectElement} */ (byId("buffering")).value),
    told: (report) => panel?.show(report),
    ended: (message) => {
      live = null;
      worker.postMessage({ type: "stop" });
      showLive(false);
      if (message) complain(message);
    },
  };
  failedEarly = "";
  const opened = microphone ? await Live.hear(microphone, wishes) : chosen ? await Live.play(chosen.mixture, chosen.file.name, wishes) : null;
  if (!opened || opened.over) return; // what ended it has been told
  live = opened;
  if (stopped || failedEarly) {
    opened.stop(failedEarly);
    return;
  }
  const places = { tracks: byId("livetracks"), facts: byId("livefacts"), said: byId("livesaid"), clock: byId("liveclock") };
  panel = new LivePanel(live, [...own.map(pretty), "the rest"], places);
  byId("livetitle").textContent = chosen ? `Live: ${chosen.file.name}` : "Live: the microphone";
  byId("feedback").hidden = chosen !== null;
  byId("live").hidden = false;
  showLive(true);
  byId("live").scrollIntoView({ block: "nearest" });
  byId("liveplay").toggleAttribute("disabled", false); // what is disabled takes no focus
  byId("liveplay").focus({ preventScroll: true });
});

/** @param {boolean} sounds */
function showLive(sounds) {
  byId("liveplay").textContent = sounds ? "Stop" : "Start";
  byId("liveplay").setAttribute("aria-pressed", String(sounds));
  byId("livesaid").textContent = sounds ? "Sounds live." : "Stopped.";
}

/** Ask what the microphone is to be asked for; it is opened when somebody starts to listen. */
function chooseMicrophone() {
  complain();
  close();
  byId("title").textContent = "Microphone";
  byId("facts").textContent =
    "Separated as it sounds. The sources are asked for by name alone. The browser asks before it opens the microphone.";
  setUp({ video: null, pictures: false });
}

// ---------------------------------------------------------------- the result

/** @type {Mixer | null} */
let mixer = null;
const controls = () => ({ play: byId("play"), seek: /** @type {HTMLInputElement} */ (byId("seek")), clock: byId("clock") });

/** What there is to say of source `n`, beside its presence. @param {string[]} own @param {Result} result @param {number} n
 * @param {Track} whole */
function remarks(own, result, n, whole) {
  const found = [];
  const like = (/** @type {number} */ a, /** @type {number} */ b) => result.alike[Math.max(a, b)][Math.min(a, b)];
  own.forEach((name, other) => {
    if (other !== n && like(n, other) > ALIKE) found.push(`nearly the same sound as ${pretty(name)}`);
  });
  if (Math.abs(result.tracks[n].level - whole.level) <= UNSEPARATED_DB && like(n, own.length) > ALIKE) {
    found.push("hardly differs from the recording");
  }
  return found;
}

/** @param {string[]} own @param {Result} result @param {boolean} looks */
function show(own, result, looks) {
  const { file, mixture, whole, video, address } = /** @type {Recording} */ (recording);
  const found = /** @type {Manifest} */ (manifest);
  const rate = found.sample_rate_hz;
  const seconds = mixture.total / rate;
  const all = [...own, "residual"];
  const loudest = Math.max(whole.peak, ...result.tracks.map((track) => track.peak));
  const voices = [whole, ...result.tracks].map((track, n) => ({ samples: track.samples, muted: n === 0, solo: false }));
  const player = new Player(voices, mixture.channels, rate, mixture.total, loudest > 0 ? Math.min(1, 0.9 / loudest) : 1);
  const clipped = result.tracks.reduce((sum, track) => sum + track.clipped, 0);
  const limited = found.separator.front_end.limit_mask_sum;
  byId("summary").textContent =
    `${clock(seconds)} in ${result.seconds.toFixed(1)} s.` +
    (looks || !facts.sees ? "" : " The sources were asked for by name alone.") +
    (limited ? " The parts and the residual add up to the recording, and no part is louder than it." : "") +
    (clipped ? ` ${clipped} samples are beyond full scale: 16 bits clip them, 32-bit float keeps them.` : "");
  const watch = byId("watch");
  watch.replaceChildren();
  /** @type {HTMLVideoElement | null} */
  let shown = null;
  if (video) {
    shown = /** @type {HTMLVideoElement} */ (make("video", { playsinline: "", "aria-label": `Video ${file.name}` }));
    shown.muted = true;
    shown.src = address;
    watch.append(shown);
  }
  const threshold = found.presence_threshold ?? 0;
  const nodes = [whole, ...result.tracks].map((track, n) => {
    const name = n === 0 ? "The recording" : pretty(all[n - 1]);
    const node = make("div", { class: "track" });
    node.style.setProperty("--mine", n === 0 || n === voices.length - 1 ? "var(--c5)" : `var(--c${(n - 1) % 6})`);
    const head = make("div", { class: "name" });
    head.append(make("span", { class: "dot", "aria-hidden": "true" }), make("h3", {}, name));
    const level = Number.isFinite(track.level) ? `${track.level.toFixed(1)} dB` : "silent";
    head.append(make("span", { class: "tag", title: "Level, of full scale" }, level));
    const p = n > 0 ? result.presence?.[n - 1] : undefined;
    if (p !== undefined) {
      const percent = Math.round(100 * p);
      const there = p >= threshold;
      head.append(make("span", { class: `tag${there ? "" : " bad"}` }, there ? `present (${percent} %)` : `probably not in this recording (presence ${percent} %)`));
    }
    if (n > 0 && n <= own.length) {
      for (const text of remarks(own, result, n - 1, whole)) head.append(make("span", { class: "tag bad" }, text));
    }
    const buttons = make("div", { class: "push" });
    /** @type {["muted" | "solo", string][]} */
    const kinds = [["muted", "Mute"], ["solo", "Solo"]];
    for (const [key, text] of n === 0 ? kinds.slice(1) : kinds) {
      const label = n === 0 ? "Hear it" : text;
      buttons.append(make("button", { type: "button", class: "quiet", "aria-pressed": "false", "data-key": key, "aria-label": `${label}: ${name}` }, label));
    }
    if (n > 0) {
      const button = make("button", { type: "button", class: "quiet", "aria-label": `Download ${name} as WAV` }, "Download");
      button.addEventListener("click", () => download(track.samples, all[n - 1]));
      buttons.append(button);
    }
    head.append(buttons);
    const view = make("div", { class: "view" });
    const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", { role: "img", "aria-label": `Spectrogram of ${name}: ${seconds.toFixed(1)} seconds from left to right, low pitch at the bottom, brighter is louder` }));
    draw(canvas, track.picture, whole.picture);
    view.append(canvas, make("span", { class: "head", "aria-hidden": "true" }));
    node.append(head, view);
    return node;
  });
  byId("tracks").replaceChildren(...nodes);
  byId("result").hidden = false;
  mixer = new Mixer(player, nodes, { ...controls(), video: shown }, (error) => complain(`the sound cannot be played: ${error.message}`));
  byId("resulttitle").tabIndex = -1;
  byId("resulttitle").focus({ preventScroll: true });
  byId("result").scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
}

/** What a file system may refuse becomes `-`. @param {string} name */
const fileName = (name) => name.replace(/[<>:"/\\|?*\s\x00-\x1f]+/g, "-").replace(/^[-.]+|[-.]+$/g, "") || "class";

/** @param {Blob} samples @param {string} name */
async function download(samples, name) {
  const { file, mixture } = /** @type {Recording} */ (recording);
  const format = /** @type {HTMLSelectElement} */ (byId("format")).value;
  try {
    const blob = await ask("write", { samples, channels: mixture.channels, format });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${file.name.replace(/\.[^.]*$/, "")}_${fileName(name)}.wav`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    complain(/** @type {Error} */ (error).message);
  }
}

// ---------------------------------------------------------------- what people do

/** @param {File} file */
const take = (file) => (file.name.toLowerCase().endsWith(".json") ? readBoxes(file) : choose(file));

function listen() {
  editor = new BoxEditor(byId("stage"), (n, box) => {
    setBox(asked[n].track, now(), box);
    look(true);
  });
  listenTo(controls(), () => mixer);
  const input = /** @type {HTMLInputElement} */ (byId("file"));
  input.addEventListener("change", () => {
    const [file] = input.files ?? [];
    input.value = "";
    if (file) take(file);
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    byId("drop").classList.add("over");
  });
  addEventListener("dragleave", () => byId("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
    const [file] = event.dataTransfer?.files ?? [];
    if (file && !input.disabled) take(file);
  });
  byId("stop").addEventListener("click", () => {
    stopped = true;
    worker.postMessage({ type: "stop" });
  });
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (recording) separate();
    else listenLive();
  });
  byId("listen").addEventListener("click", () => listenLive());
  byId("mic").addEventListener("click", chooseMicrophone);
  byId("liveplay").addEventListener("click", () => (live ? live.stop() : listenLive()));
  byId("buffering").addEventListener("change", () => (live ? listenLive() : undefined));
  byId("more").addEventListener("click", () => {
    const known = /** @type {Manifest} */ (manifest).classes;
    const free = known.findIndex((_, k) => !asked.some((source) => source.classId === k));
    asked.push({ classId: Math.max(free, 0), track: [{ time: 0, box: WHOLE }] });
    showSources();
  });
  byId("scrub").addEventListener("input", async () => {
    byId("second").textContent = `${now().toFixed(1)} s`;
    editor.move(asked.map(({ track }) => boxAt(track, now())));
    const video = recording?.video;
    if (video && !video.seeking) await seek(video, now()).catch(() => {});
    if (video && Math.abs(video.currentTime - now()) > 0.01) video.currentTime = now();
  });
  byId("whole").addEventListener("click", () => {
    setBox(asked[editor.chosen].track, now(), WHOLE);
    showBoxes();
  });
  byId("forget").addEventListener("click", () => {
    for (const source of asked) source.track = upTo(source.track, now());
    showBoxes();
  });
  byId("find").addEventListener("click", () => busy("looking for objects", async () => {
    if (!recording || !local) return;
    recording.id ||= await local.upload(recording.file);
    const known = /** @type {Manifest} */ (manifest).classes;
    const tracks = await local.boxes(recording.id, names().map((name, n) => ({ name, class: known[asked[n].classId] })));
    tracks.forEach((track, n) => (asked[n].track = track));
    look(true);
    showBoxes();
  }));
  byId("all").addEventListener("click", async () => {
    if (!mixer) return;
    const own = [...names(), "residual"];
    for (const [n, voice] of mixer.player.voices.slice(1).entries()) await download(voice.samples, own[n]);
  });
}

listen();
if (local) {
  byId("lead").textContent = "Drop a video or a sound. It stays on this computer.";
  if (!local.browser) /** @type {HTMLSelectElement} */ (byId("runs")).value = "python";
} else if ("serviceWorker" in navigator && isSecureContext) {
  navigator.serviceWorker.register("sw.js").catch(() => {}); // without it the page only needs its server each time
}
load();
