// The worker: everything that takes long, beside the page. It verifies the bundle, prepares sound and separates it.

import { Files } from "./bundle.js";
import { Engine, canTry } from "./engine.js";
import { LiveBlocks, timing } from "./live_blocks.js";
import { Resampler, resampledLength } from "./resample.js";
import { Separator, graphOf, residual } from "./separator.js";
import { checkSamples, findSamples, isPlain, readBlocks, RATES, wavFile } from "./wav.js";
import { Spectrogram } from "./spectrogram.js";

/** @typedef {import("./bundle.js").Manifest} Manifest */
/** @typedef {{ samples: Blob, total: number, channels: number, note: string }} Mixture interleaved float32 at the
 *   separator's rate */
/** @typedef {{ samples: Blob, level: number, picture: import("./spectrogram.js").Picture, clipped: number, peak: number }} Track */

const BLOCK = 1 << 18; // samples of each channel that are worked on at once
const SILENT_PEAK = 1e-5; // -100 dB: 16-bit noise lies above it
const folder = new URL("./", import.meta.url);

/** @type {Separator | null} */
let separator = null;
/** @type {Manifest | null} */
let manifest = null;
let stopped = false;
/** @type {LiveBlocks | null} */
let live = null;

const post = (/** @type {any} */ message) => /** @type {any} */ (self).postMessage(message);
const report = (/** @type {string} */ text, /** @type {number} */ done, /** @type {number} */ total) =>
  post({ type: "progress", text, done, total });

/** Verify the bundle and make its graphs ready, on the first backend that computes what it should.
 * @param {{ bundle: string, backend: "auto" | "wasm" | "webgpu", threads: number }} asked */
async function open({ bundle, backend, threads }) {
  const base = new URL(bundle, folder);
  const files = await Files.open(base);
  manifest = files.manifest;
  const main = graphOf(manifest);
  const causal = main.kind === "stream";
  const graphs = [main];
  for (const visual of manifest.visual) {
    const found = manifest.graphs.find((graph) => graph.file === visual.graph);
    if (found) graphs.push(found);
  }
  const names = [...graphs.map((g) => g.file), ...graphs.map((g) => g.golden)];
  /** @type {Map<string, Uint8Array>} */
  const models = new Map();
  for (const [k, graph] of graphs.entries()) {
    report(`checking ${graph.file}`, k, graphs.length);
    models.set(graph.file, await files.read(graph.file));
  }
  const goldens = [];
  for (const graph of graphs) goldens.push(await files.golden(graph));
  const notes = [];
  // A call of a stream is too little work for a GPU or threads: its states would go there and back every few milliseconds
  const auto = causal ? ["wasm"] : ["webgpu", "wasm"];
  for (const name of /** @type {("webgpu" | "wasm")[]} */ (backend === "auto" ? auto : [backend])) {
    if (!(await canTry(name, backend !== "auto"))) {
      if (backend !== "auto") throw new Error(`this browser has no ${name}: leave ?backend=${name} out of the address`);
      continue;
    }
    /** @type {Engine[]} */
    const engines = [];
    try {
      let worst = 0;
      for (const [k, graph] of graphs.entries()) {
        report(`testing ${graph.file} on ${name}`, k, graphs.length);
        const model = /** @type {Uint8Array} */ (models.get(graph.file));
        const engine = await Engine.open(name, new URL("ort/", folder), graph, model, threads || (causal ? 1 : 0));
        engines.push(engine);
        worst = Math.max(worst, await engine.check(goldens[k]));
      }
      const encoders = new Map(engines.slice(1).map((e) => [e.graph.kind.replace("_encoder", ""), e]));
      separator = new Separator(manifest, engines[0], encoders);
      return { manifest, backend: name, threads: engines[0].threads, worst, checked: names.length + 1, notes };
    } catch (error) {
      await Promise.allSettled(engines.map((engine) => engine.close()));
      if (name === "wasm" || backend !== "auto") throw error;
      notes.push(`WebGPU is not used: ${/** @type {Error} */ (error).message}`);
    }
  }
  throw new Error("this browser runs neither WebGPU nor WebAssembly");
}

/** Bring sound to the separator's rate, and to one channel where the bundle does not take its channels.
 * @param {AsyncIterable<Float32Array[]> | Iterable<Float32Array[]>} blocks @param {string} name @param {number} count
 * channels @param {number} rate @param {number} length samples, for the progress @param {boolean} [loud] whether
 * silence is a mistake @param {number} [to] another rate than the separator's @returns {Promise<Mixture>} */
async function prepared(blocks, name, count, rate, length, loud = true, to = 0) {
  const { sample_rate_hz, channels: taken = 1 } = /** @type {Manifest} */ (manifest);
  const own = to || sample_rate_hz;
  if (!(rate >= RATES[0] && rate <= RATES[1])) {
    throw new Error(`${name} states a sample rate of ${rate} Hz, and recordings have ${RATES[0]} to ${RATES[1]} Hz`);
  }
  const kept = count === 1 || count === taken ? count : 1;
  const resamplers = Array.from({ length: kept }, () => new Resampler(rate, own));
  /** @type {Blob[]} */
  const parts = [];
  let [total, peak, read] = [0, 0, 0];
  const keep = (/** @type {Float32Array[]} */ rows) => {
    if (!rows[0].length) return;
    parts.push(new Blob([interleaved(rows)])); // a Blob each: the browser may keep it on disk
    total += rows[0].length;
  };
  for await (const block of blocks) {
    if (stopped) throw new Error("stopped");
    for (const channel of block) checkSamples(name, channel);
    const mono = mean(block);
    for (const value of mono) peak = Math.max(peak, Math.abs(value));
    keep((kept === count ? block : [mono]).map((channel, c) => resamplers[c].push(channel)));
    read += mono.length;
    report(`reading ${name}`, read, Math.max(length, read));
  }
  if (!read) throw new Error(`${name} holds no samples: it is empty or truncated`);
  keep(resamplers.map((resampler) => resampler.flush()));
  if (loud && peak < SILENT_PEAK) {
    const when = count > 1 ? ` when its ${count} channels are mixed to mono` : "";
    throw new Error(`${name} is silent${when}: there is nothing to separate`);
  }
  if (total !== resampledLength(read, rate, own)) throw new Error(`${name}: ${total} samples came of ${read}`);
  const kinds = taken === 1 ? "one channel" : `one channel or ${taken}`;
  const note = kept === count ? "" : `Its ${count} channels are mixed to mono, since this separator takes ${kinds}.`;
  return { samples: new Blob(parts), total, channels: kept, note };
}

/** The sound of a WAV file; null of another kind, which the page decodes. @param {{ file: File, quiet?: boolean }} asked */
async function readFile({ file, quiet }) {
  const form = await findSamples(file, file.name);
  if (!form || !isPlain(form)) return null;
  const length = Math.floor(form.size / (form.channels * (form.bits / 8)));
  return prepared(readBlocks(file, form, BLOCK), file.name, form.channels, form.rate, length, !quiet);
}

/** @param {{ name: string, channels: Float32Array[], rate: number }} asked */
function readDecoded({ name, channels, rate }) {
  function* blocks() {
    for (let at = 0; at < channels[0].length; at += BLOCK) yield channels.map((c) => c.subarray(at, at + BLOCK));
  }
  return prepared(blocks(), name, channels.length, rate, channels[0].length);
}

/** @param {{ mixture: Mixture, sources: import("./separator.js").Source[] }} asked */
async function separate({ mixture, sources }) {
  if (!separator || !manifest) throw new Error("the bundle is not loaded");
  await live?.end();
  stopped = false;
  separator.encoded.clear();
  const { channels, total } = mixture;
  const rate = manifest.sample_rate_hz;
  const begun = performance.now();
  const read = async (/** @type {number} */ start, /** @type {number} */ count) =>
    rows(new Float32Array(await mixture.samples.slice(start * channels * 4, (start + count) * channels * 4).arrayBuffer()), channels);
  const writers = Array.from({ length: sources.length + 1 }, () => new Writer(total, rate));
  const likeness = new Likeness(sources.length + 1);
  const presence = await separator.separate(
    total,
    channels,
    sources,
    read,
    async (start, done) => {
      if (stopped) throw new Error("stopped");
      const left = await read(start, done[0][0].length);
      likeness.add([...done.map(mean), mean(left)]);
      residual(left, done);
      done.forEach((source, n) => writers[n].add(source));
      writers[sources.length].add(left);
    },
    (done, all) => report("separating", done, all),
  );
  const seconds = (performance.now() - begun) / 1000;
  const tracks = writers.map((writer) => writer.track());
  return { tracks, presence: presence && [...presence], alike: likeness.correlations(), seconds };
}

/** How much signals of one channel are alike, as they come. */
class Likeness {
  /** @param {number} count of signals */
  constructor(count) {
    this.sums = new Float64Array(count);
    this.products = Array.from({ length: count }, () => new Float64Array(count));
    this.length = 0;
  }

  /** @param {Float32Array[]} signals */
  add(signals) {
    this.length += signals[0].length;
    signals.forEach((one, a) => {
      for (const value of one) this.sums[a] += value;
      for (let b = 0; b <= a; b += 1) {
        let sum = 0;
        for (let k = 0; k < one.length; k += 1) sum += one[k] * signals[b][k];
        this.products[a][b] += sum;
      }
    });
  }

  /** Of each two signals, the later one's row first. @returns {number[][]} */
  correlations() {
    const of = (/** @type {number} */ a, /** @type {number} */ b) =>
      this.products[a][b] - (this.sums[a] * this.sums[b]) / this.length;
    return this.products.map((row, a) => [...row.subarray(0, a + 1)].map((_, b) => of(a, b) / Math.sqrt(of(a, a) * of(b, b) || 1)));
  }
}

/** Level, spectrogram and samples of one signal, as it comes. */
class Writer {
  /** @param {number} total samples @param {number} rate */
  constructor(total, rate) {
    this.spectrogram = new Spectrogram(total, rate);
    /** @type {Blob[]} */
    this.parts = [];
    this.power = 0;
    this.count = 0;
    this.clipped = 0;
    this.peak = 0;
  }

  /** @param {Float32Array[]} channels */
  add(channels) {
    for (const channel of channels) {
      for (const value of channel) {
        this.power += value * value;
        this.peak = Math.max(this.peak, Math.abs(value));
        if (Math.abs(value) > 1) this.clipped += 1;
      }
      this.count += channel.length;
    }
    this.spectrogram.add(mean(channels));
    this.parts.push(new Blob([interleaved(channels)]));
  }

  /** @returns {Track} */
  track() {
    const level = 10 * Math.log10(this.power / this.count);
    const picture = this.spectrogram.picture();
    return { samples: new Blob(this.parts), level, picture, clipped: this.clipped, peak: this.peak };
  }
}

/** Make ready to separate blocks that come by `port`, in real time, until the next task or a stop.
 * @param {{ port: MessagePort, sources: import("./separator.js").Source[], channels: number, rate: number, total: number }}
 * asked `rate`: of the blocks; `total`: samples at the separator's rate, 0 where nobody knows */
async function listen({ port, sources, channels, rate, total }) {
  if (!separator?.layout || !manifest) throw new Error("this bundle takes chunks: only a causal one can be heard live");
  await live?.end();
  separator.encoded.clear();
  await separator.lookAhead(sources, total);
  // the graph's first calls are slower than the others
  await separator.stream(sources, channels).push(rows(new Float32Array(channels * 8 * separator.layout.nFft), channels));
  live = new LiveBlocks(separator, sources, channels, rate, port, (error) => post({ type: "live", message: error.message }));
  return timing(separator.layout, manifest.sample_rate_hz, rate);
}

/** A mixture at another rate. @param {{ mixture: Mixture, name: string, rate: number }} asked */
function resampled({ mixture, name, rate }) {
  async function* blocks() {
    const step = BLOCK * 4 * mixture.channels;
    for (let at = 0; at < mixture.samples.size; at += step) {
      yield rows(new Float32Array(await mixture.samples.slice(at, at + step).arrayBuffer()), mixture.channels);
    }
  }
  const { sample_rate_hz: own } = /** @type {Manifest} */ (manifest);
  return prepared(blocks(), name, mixture.channels, own, mixture.total, false, rate);
}

/** What a track would be of a signal that is there. @param {{ mixture: Mixture }} asked @returns {Promise<Track>} */
async function look({ mixture }) {
  const writer = new Writer(mixture.total, /** @type {Manifest} */ (manifest).sample_rate_hz);
  const step = BLOCK * 4 * mixture.channels;
  for (let at = 0; at < mixture.samples.size; at += step) {
    writer.add(rows(new Float32Array(await mixture.samples.slice(at, at + step).arrayBuffer()), mixture.channels));
  }
  return { ...writer.track(), samples: mixture.samples };
}

/** [L] of each channel -> their mean, [L] @param {Float32Array[]} channels */
function mean(channels) {
  if (channels.length === 1) return channels[0];
  const out = new Float32Array(channels[0].length);
  for (let k = 0; k < out.length; k += 1) {
    let sum = 0;
    for (const channel of channels) sum += channel[k];
    out[k] = sum / channels.length;
  }
  return out;
}

/** @param {Float32Array[]} channels */
function interleaved(channels) {
  const out = new Float32Array(channels.length * channels[0].length);
  channels.forEach((channel, c) => {
    for (let k = 0; k < channel.length; k += 1) out[k * channels.length + c] = channel[k];
  });
  return out;
}

/** @param {Float32Array} samples interleaved @param {number} channels */
function rows(samples, channels) {
  const length = samples.length / channels;
  return Array.from({ length: channels }, (_, c) => {
    const out = new Float32Array(length);
    for (let k = 0; k < length; k += 1) out[k] = samples[k * channels + c];
    return out;
  });
}

/** @param {{ samples: Blob, channels: number, format: "PCM_16" | "FLOAT" }} asked */
const write = ({ samples, channels, format }) =>
  wavFile(samples, channels, /** @type {Manifest} */ (manifest).sample_rate_hz, format);

/** Where another program runs the bundle, only its manifest is asked for. @param {{ manifest: Manifest }} asked */
async function describe(asked) {
  manifest = asked.manifest;
}

/** @type {Record<string, (asked: any) => Promise<any>>} */
const TASKS = { open, describe, readFile, readDecoded, resampled, separate, listen, look, write };

self.addEventListener("message", async ({ data }) => {
  if (data.type === "stop") {
    stopped = true;
    live?.end();
    return;
  }
  if (["readFile", "readDecoded", "resampled"].includes(data.type)) stopped = false;
  try {
    post({ type: "done", id: data.id, result: await TASKS[data.type](data) });
  } catch (error) {
    post({ type: "failed", id: data.id, message: error instanceof Error ? error.message : String(error) });
  }
});
