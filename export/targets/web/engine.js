// ONNX Runtime in the browser: which build of it runs, and the sessions of a bundle's graphs.

import { largestDifference } from "./bundle.js";
import { runSequence } from "./stream.js";
import { decompress } from "./zip.js";

/** @typedef {import("./bundle.js").Graph} Graph */
/** @typedef {import("./npz.js").Values} Values */
/** @typedef {{ data: any, dims: readonly number[] }} OrtTensor */
/** @typedef {{ run(feeds: Record<string, OrtTensor>): Promise<Record<string, OrtTensor>>,
 *   release(): Promise<void>, inputNames: readonly string[] }} OrtSession */
/** @typedef {{ env: any, Tensor: new (type: string, data: any, dims: readonly number[]) => OrtTensor,
 *   InferenceSession: { create(model: Uint8Array, options: object): Promise<OrtSession> } }} Ort */
/** @typedef {"wasm" | "webgpu"} Backend */

/** The files of each build, as they lie in the site's folder `ort`; the WASM is packed. */
const BUILDS = {
  wasm: { script: "ort.wasm.min.mjs", loader: "ort-wasm-simd-threaded.mjs", wasm: "ort-wasm-simd-threaded.wasm.gz" },
  webgpu: {
    script: "ort.jspi.min.mjs",
    loader: "ort-wasm-simd-threaded.jspi.mjs",
    wasm: "ort-wasm-simd-threaded.jspi.wasm.gz",
  },
};

/** Whether this browser may run the build: WebGPU needs an adapter, and WASM that can wait for it (JSPI). An adapter that
 * is computed on the CPU is slower than WASM, and taken only where it is asked for.
 * @param {Backend} backend @param {boolean} asked */
export async function canTry(backend, asked) {
  if (backend === "wasm") return true;
  const gpu = /** @type {any} */ (navigator).gpu;
  if (!gpu || !("Suspending" in WebAssembly)) return false;
  try {
    const adapter = await gpu.requestAdapter();
    return adapter !== null && (asked || !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter));
  } catch {
    return false;
  }
}

/** @type {Map<Backend, Promise<Ort>>} */
const loaded = new Map();

/** @param {Backend} backend @param {URL} folder @param {number} threads @returns {Promise<Ort>} */
function load(backend, folder, threads) {
  const started = loaded.get(backend) ?? start(backend, folder, threads);
  loaded.set(backend, started);
  return started;
}

/** @param {Backend} backend @param {URL} folder @param {number} threads @returns {Promise<Ort>} */
async function start(backend, folder, threads) {
  const build = BUILDS[backend];
  const answer = await fetch(new URL(build.wasm, folder));
  if (!answer.ok) throw new Error(`${build.wasm} cannot be loaded (${answer.status})`);
  const packed = new Uint8Array(await answer.arrayBuffer());
  /** @type {Ort} */
  const ort = await import(new URL(build.script, folder).href);
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = { mjs: new URL(build.loader, folder).href };
  // a server may unpack it on the way
  const isPacked = packed[0] === 0x1f && packed[1] === 0x8b;
  ort.env.wasm.wasmBinary = (isPacked ? await decompress(packed, "gzip") : packed).buffer;
  // threads need memory that they share, which browsers give to isolated pages alone; a core is left for the page
  const usual = Math.max(1, Math.min(4, navigator.hardwareConcurrency - 1));
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? threads || usual : 1;
  return ort;
}

/** A graph, ready to run. */
export class Engine {
  /** @param {Ort} ort @param {OrtSession} session @param {Graph} graph */
  constructor(ort, session, graph) {
    this.ort = ort;
    this.session = session;
    this.graph = graph;
  }

  /** @param {Backend} backend @param {URL} folder of the builds @param {Graph} graph @param {Uint8Array} model
   * @param {number} threads 0: as many as suit the browser */
  static async open(backend, folder, graph, model, threads) {
    const ort = await load(backend, folder, threads);
    const session = await ort.InferenceSession.create(model, {
      executionProviders: [backend],
      graphOptimizationLevel: "all",
      logSeverityLevel: 3, // what matters is thrown
    });
    return new Engine(ort, session, graph);
  }

  /** How many threads the builds were given. */
  get threads() {
    return this.ort.env.wasm.numThreads;
  }

  /** Inputs by name, in the graph's types and order of values -> outputs by name.
   * @param {Record<string, { data: Values, shape: number[] }>} inputs @returns {Promise<Record<string, Float32Array>>} */
  async run(inputs) {
    /** @type {Record<string, OrtTensor>} */
    const feeds = {};
    for (const tensor of this.graph.inputs) {
      const { data, shape } = inputs[tensor.name];
      feeds[tensor.name] = new this.ort.Tensor(tensor.dtype, data, shape);
    }
    const results = await this.session.run(feeds);
    return Object.fromEntries(this.graph.outputs.map(({ name }) => [name, results[name].data]));
  }

  /** Run it on its golden inputs; the largest difference from the golden outputs. Throws where it is more than the
   * manifest allows. @param {Record<string, import("./npz.js").NpyArray>} golden */
  async check(golden) {
    let worst = 0;
    const compare = (/** @type {Float32Array} */ found, /** @type {ArrayLike<number>} */ expected) =>
      (worst = Math.max(worst, largestDifference(found, expected)));
    if (this.graph.kind === "stream") {
      await runSequence((inputs) => this.run(inputs), this.graph, golden, compare);
    } else {
      const outputs = await this.run(golden);
      for (const { name } of this.graph.outputs) compare(outputs[name], /** @type {any} */ (golden[name].data));
    }
    if (!(worst <= this.graph.tolerance)) {
      throw new Error(
        `${this.graph.file} differs from its golden output by ${worst.toExponential(1)}, more than ` +
          this.graph.tolerance.toExponential(0),
      );
    }
    return worst;
  }

  close() {
    return this.session.release();
  }
}
