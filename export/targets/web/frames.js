// Frames of a video at a steady rate, cut out by boxes: what avsep/media does with PyAV, with the browser's decoder.

import { MOTION_RATE_HZ, OBJECT_RATE_HZ } from "./timeline.js";
import { boxAt } from "./track.js";

/** @typedef {import("./track.js").Track} Track */
/** @typedef {import("./bundle.js").Manifest} Manifest */
/** @typedef {import("./timeline.js").Timeline} Timeline */

/** First and last pixel of an edge pair: halves go to the even number, as Python rounds, and two pixels are the least.
 * @param {number} low @param {number} high @param {number} count @returns {[number, number]} */
export function pixels(low, high, count) {
  const even = (/** @type {number} */ x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));
  let [first, last] = [even(low * count), even(high * count)];
  if (last - first < 2) {
    first = Math.max(Math.min(first, count - 2), 0);
    last = Math.min(first + 2, count);
  }
  return [first, last];
}

/** How much of each input pixel goes into an output pixel, along one axis: means over areas. Where there are more
 * output pixels than input ones, the two nearest are mixed. @param {number} from @param {number} to */
function weights(from, to) {
  const scale = from / to;
  return Array.from({ length: to }, (_, k) => {
    /** @type {[number, number][]} */
    const parts = [];
    if (scale <= 1) {
      const x = Math.max(0, Math.min(from - 1, (k + 0.5) * scale - 0.5));
      const low = Math.floor(x);
      parts.push([low, 1 - (x - low)]);
      if (x > low) parts.push([low + 1, x - low]);
      return parts;
    }
    for (let i = Math.floor(k * scale); i < Math.min(from, (k + 1) * scale - 1e-9); i += 1) {
      parts.push([i, (Math.min(i + 1, (k + 1) * scale) - Math.max(i, k * scale)) / scale]);
    }
    return parts;
  });
}

/** Pixels [h, w, 4] -> [channels, height, width], 3 channels or one of grey.
 * @param {Uint8ClampedArray} rgba @param {number} w @param {number} h @param {number} height @param {number} width
 * @param {number[] | null} grey weights of red, green and blue, or null */
export function sized(rgba, w, h, height, width, grey) {
  const count = grey ? 1 : 3;
  const across = weights(w, width);
  const down = weights(h, height);
  const middle = new Float32Array(h * width * count);
  for (let y = 0; y < h; y += 1) {
    for (let x = 0; x < width; x += 1) {
      for (let c = 0; c < count; c += 1) {
        let sum = 0;
        for (const [i, share] of across[x]) {
          const at = 4 * (y * w + i);
          sum += share * (grey ? grey[0] * rgba[at] + grey[1] * rgba[at + 1] + grey[2] * rgba[at + 2] : rgba[at + c]);
        }
        middle[(y * width + x) * count + c] = sum;
      }
    }
  }
  const out = new Uint8Array(count * height * width);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      for (let c = 0; c < count; c += 1) {
        let sum = 0;
        for (const [i, share] of down[y]) sum += share * middle[(i * width + x) * count + c];
        out[(c * height + y) * width + x] = Math.max(0, Math.min(255, Math.round(sum)));
      }
    }
  }
  return out;
}

/** Go to a moment; the frame may come a little later. @param {HTMLVideoElement} video @param {number} time in seconds */
export function seek(video, time) {
  return new Promise((resolve, reject) => {
    const done = () => {
      video.removeEventListener("seeked", arrived);
      video.removeEventListener("error", failed);
    };
    const arrived = () => (done(), resolve(undefined));
    const failed = () => (done(), reject(new Error("the video cannot be decoded further: it is damaged")));
    video.addEventListener("seeked", arrived);
    video.addEventListener("error", failed);
    video.currentTime = time;
  });
}

const LATE_MS = 120; // after a seek, until a frame that stays is taken for the one that was asked for
const STEP_MS = 4;

/** When the frame that a video shows begins, in microseconds; NaN where the browser does not tell.
 * @param {HTMLVideoElement} video */
function shownFrame(video) {
  if (typeof VideoFrame === "undefined") return NaN;
  const frame = new VideoFrame(video);
  const { timestamp } = frame;
  frame.close();
  return timestamp;
}

/** Shows frames of a video, one moment after the other. */
class Viewer {
  /** @param {HTMLVideoElement} video */
  constructor(video) {
    this.video = video;
    this.shortest = Infinity; // microseconds from one frame to the next, of those that were seen
  }

  /** Show the frame of a moment, and wait until it is there: a browser says that it arrived before it has decoded, so
   * that for some milliseconds the frame before could be taken. @param {number} time in seconds */
  async show(time) {
    const before = shownFrame(this.video);
    await seek(this.video, time);
    const begun = performance.now();
    // where no frame is known to come in between, the same one may stay
    const stays = 1e6 * time < before + this.shortest - 1 && this.shortest < Infinity;
    for (;;) {
      const found = shownFrame(this.video);
      if (found !== before && !Number.isNaN(before)) {
        if (found > before) this.shortest = Math.min(this.shortest, found - before);
        return;
      }
      if (stays || performance.now() - begun > LATE_MS) return;
      await new Promise((resolve) => setTimeout(resolve, STEP_MS));
    }
  }
}

/** A video element of a file, once its first frame is there; null where the browser sees no pictures in it.
 * @param {string} address @returns {Promise<HTMLVideoElement | null>} */
export function openVideo(address) {
  return new Promise((resolve) => {
    const video = document.createElement("video");
    video.muted = true;
    video.playsInline = true;
    video.preload = "auto";
    video.addEventListener("loadeddata", () => resolve(video.videoWidth > 0 ? video : null), { once: true });
    video.addEventListener("error", () => resolve(null), { once: true });
    video.src = address;
  });
}

/** What the separator sees of each source.
 * @param {string} address of the video @param {number} seconds of the recording @param {Manifest} manifest
 * @param {{ name: string, track: Track }[]} sources @param {(done: number, total: number) => void} progress
 * @param {() => boolean} stopped @returns {Promise<Timeline[]>} */
export async function timelines(address, seconds, manifest, sources, progress, stopped) {
  const video = await openVideo(address);
  if (!video) throw new Error("the pictures of this video cannot be decoded");
  const [width, height] = [video.videoWidth, video.videoHeight];
  const length = Number.isFinite(video.duration) ? video.duration : seconds;
  // luma by the colours that browsers take a video of this size for
  const grey = height >= 720 ? [0.2126, 0.7152, 0.0722] : [0.299, 0.587, 0.114];
  const wanted = manifest.visual.filter((visual) => visual.graph !== null);
  /** @type {Timeline[]} */
  const found = sources.map(({ name }) => ({ name, object: null, motion: null, moves: true }));
  const canvas = document.createElement("canvas");
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { willReadFrequently: true }));
  /** @type {{ time: number, write: (() => void)[] }[]} */
  const moments = [];
  for (const visual of wanted) {
    const rate = visual.role === "object" ? OBJECT_RATE_HZ : visual.rate_hz || MOTION_RATE_HZ;
    const count = Math.max(1, Math.ceil(length * rate - 0.5));
    const shape = /** @type {number[]} */ (manifest.graphs.find((g) => g.file === visual.graph)?.inputs[0].shape);
    const [channels, h, w] = shape.slice(-3);
    const size = channels * h * w;
    sources.forEach((_, n) => (found[n][visual.role] = { data: new Uint8Array(count * size), count, rate }));
    for (let i = 0; i < count; i += 1) {
      const time = (i + 0.5) / rate;
      moments.push({
        time,
        write: sources.map(({ track }, n) => () => {
          const box = boxAt(track, time);
          const [left, right] = pixels(box[0], box[2], width);
          const [top, bottom] = pixels(box[1], box[3], height);
          canvas.width = right - left;
          canvas.height = bottom - top;
          context.drawImage(video, left, top, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
          const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
          const frame = sized(data, canvas.width, canvas.height, h, w, channels === 1 ? grey : null);
          /** @type {import("./timeline.js").Frames} */ (found[n][visual.role]).data.set(frame, i * size);
        }),
      });
    }
  }
  const viewer = new Viewer(video);
  moments.sort((a, b) => a.time - b.time);
  for (const [k, { time, write }] of moments.entries()) {
    if (stopped()) throw new Error("stopped");
    // just after the frame begins: a time that is rounded down would show the one before
    const at = Math.min(time + 0.0005, Math.max(0, length - 0.0005));
    if (Math.abs(video.currentTime - at) > 1e-6) await viewer.show(at);
    write.forEach((one) => one());
    progress(k + 1, moments.length);
  }
  video.removeAttribute("src");
  video.load();
  return found;
}
