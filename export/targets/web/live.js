// Hearing a causal separator live: from a microphone or a file through the audio thread and the worker to the ear.

import { Player } from "./player.js";

/** @typedef {import("./live_processor.js").LiveReport} LiveReport */
/** @typedef {import("./worker.js").Mixture} Mixture */
/** @typedef {(type: string, asked?: object, transfer?: Transferable[]) => Promise<any>} Ask */
/** @typedef {{ ask: Ask, rate: number, channels: number, sources: import("./separator.js").Source[], total: number,
 *   bufferingMs: number, told: (report: LiveReport) => void, ended: (message: string) => void }} Wishes `rate`: the
 *   separator's; `total`: samples at that rate, 0 of a microphone; `ended`: with what went wrong, or nothing */

const MOST_WAITING_S = 0.5; // of blocks that the worker has not answered, beside those that the buffering lets wait
const FADE_S = 0.01;

/** Open the microphone, as it is: what browsers do for calls would change what is separated. @param {number} channels
 * @returns {Promise<MediaStream>} */
export async function openMicrophone(channels) {
  if (!navigator.mediaDevices) throw new Error("browsers give the microphone to pages of https:// or localhost alone");
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: { ideal: channels } },
    });
  } catch (error) {
    const { name, message } = /** @type {DOMException} */ (error);
    if (name === "NotAllowedError") throw new Error("the microphone was not allowed: allow it in the browser's settings of this page");
    if (name === "NotFoundError") throw new Error("no microphone is there: connect one");
    throw new Error(`the microphone cannot be opened (${message || name})`);
  }
}

export class Live {
  /** @param {AudioContext} context @param {AudioWorkletNode} node @param {Wishes} wishes @param {number} windowMs
   * @param {number} bufferingMs as it came to be @param {number} blockMs of sound in a block */
  constructor(context, node, wishes, windowMs, bufferingMs, blockMs) {
    this.context = context;
    this.node = node;
    this.wishes = wishes;
    this.windowMs = windowMs;
    this.bufferingMs = bufferingMs;
    this.blockMs = blockMs;
    /** What is done to each source, and at last to the rest. */
    this.voices = Array.from({ length: wishes.sources.length + 1 }, (_, n) => {
      const gain = context.createGain();
      node.connect(gain, n);
      gain.connect(context.destination);
      return { volume: 1, muted: false, solo: false, gain };
    });
    /** @type {(() => void)[]} */
    this.closing = [];
    this.over = false;
    node.port.onmessage = ({ data }) => wishes.told(data);
    node.addEventListener("processorerror", () => this.stop("the audio thread has failed: reload the page"));
  }

  /** Separate what a microphone hears. @param {MediaStream} microphone @param {Wishes} wishes */
  static async hear(microphone, wishes) {
    /** @type {Live | null} */
    let live = null;
    try {
      try {
        live = await Live.open(contextOf(wishes.rate), wishes);
        live.context.createMediaStreamSource(microphone).connect(live.node);
      } catch (error) {
        // a browser may connect no microphone to a context of another rate than the sound card's
        if (/** @type {DOMException} */ (error).name !== "NotSupportedError") throw error;
        live?.close();
        live = await Live.open(new AudioContext(), wishes);
        live.context.createMediaStreamSource(microphone).connect(live.node);
      }
      const opened = live;
      const [track] = microphone.getAudioTracks();
      track.addEventListener("ended", () => opened.stop("the microphone was disconnected"));
      opened.closing.push(() => microphone.getTracks().forEach((one) => one.stop()));
      opened.node.port.postMessage({ soon: true });
      await opened.context.resume();
      return opened;
    } catch (error) {
      live?.close();
      microphone.getTracks().forEach((one) => one.stop());
      throw error;
    }
  }

  /** Separate a recording as it plays. @param {Mixture} mixture @param {string} name @param {Wishes} wishes */
  static async play(mixture, name, wishes) {
    const live = await Live.open(contextOf(wishes.rate), wishes);
    try {
      const rate = live.context.sampleRate;
      const own = rate === wishes.rate ? mixture : await wishes.ask("resampled", { mixture, name, rate });
      const player = new Player([{ samples: own.samples, muted: false, solo: false }], own.channels, rate, own.total, 1);
      player.into(live.node);
      player.onbegin = (at) => live.node.port.postMessage({ begin: Math.round(at * rate) });
      player.onend = () => setTimeout(() => live.stop(), live.windowMs + live.bufferingMs + 50);
      live.closing.push(() => player.close());
      player.play().catch((error) => live.stop(error.message));
    } catch (error) {
      live.close();
      throw error;
    }
    return live;
  }

  /** @param {AudioContext} context @param {Wishes} wishes */
  static async open(context, wishes) {
    try {
      const rate = context.sampleRate;
      await context.audioWorklet.addModule(new URL("live_processor.js", import.meta.url));
      const { port1, port2 } = new MessageChannel();
      const { sources, channels, total } = wishes;
      const { block, delay } = await wishes.ask("listen", { port: port2, sources, channels, rate, total }, [port2]);
      const buffering = Math.round((wishes.bufferingMs * rate) / 1000);
      const most = Math.ceil((buffering + MOST_WAITING_S * rate) / block);
      const node = new AudioWorkletNode(context, "avsep-live", {
        numberOfOutputs: sources.length + 1,
        outputChannelCount: Array(sources.length + 1).fill(channels),
        channelCount: channels,
        channelCountMode: "explicit",
        processorOptions: { block, channels, delay: delay + buffering, most },
      });
      node.port.postMessage({ worker: port1 }, [port1]);
      const [windowMs, ownMs, blockMs] = [delay, buffering, block].map((samples) => (1000 * samples) / rate);
      return new Live(context, node, wishes, windowMs, ownMs, blockMs);
    } catch (error) {
      await context.close();
      throw error;
    }
  }

  /** What the browser says of its own delay, in milliseconds. */
  get browserMs() {
    const { baseLatency = 0, outputLatency = 0 } = this.context;
    return 1000 * (baseLatency + outputLatency);
  }

  /** Let what was chosen of each voice be heard. */
  balance() {
    const solo = this.voices.some((voice) => voice.solo);
    for (const { volume, muted, solo: alone, gain } of this.voices) {
      const heard = solo ? alone : !muted;
      gain.gain.setTargetAtTime(heard ? volume : 0, this.context.currentTime, FADE_S);
    }
  }

  /** @param {string} [message] what went wrong */
  stop(message = "") {
    if (this.close()) this.wishes.ended(message);
  }

  /** Whether it was open. */
  close() {
    if (this.over) return false;
    this.over = true;
    this.closing.forEach((close) => close());
    this.node.port.onmessage = null;
    this.node.port.postMessage({ end: true });
    this.context.close().catch(() => {}); // a player of it may have closed it
    return true;
  }
}

/** A context of a rate, or of the browser's own where it refuses that. @param {number} rate */
function contextOf(rate) {
  try {
    return new AudioContext({ sampleRate: rate });
  } catch {
    return new AudioContext();
  }
}

