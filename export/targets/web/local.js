// The local server of `avsep app`: what Python does for the page where the browser cannot.

import { readNpz } from "./npz.js";

/** @typedef {import("./track.js").Track} Track */
/** @typedef {import("./timeline.js").Timeline} Timeline */

export class Local {
  /** @param {{ token: string, detector: boolean, browser: boolean, engine: string }} told */
  constructor({ token, detector, browser, engine }) {
    this.token = token;
    this.detector = detector;
    this.browser = browser;
    this.engine = engine;
  }

  /** The server that the page comes from, where it is one of `avsep app`; else null. */
  static find() {
    const told = document.querySelector('meta[name="avsep-app"]')?.getAttribute("content");
    return told ? new Local(JSON.parse(told)) : null;
  }

  /** @param {string} path @param {BodyInit} body @returns {Promise<Response>} */
  async ask(path, body) {
    const answer = await fetch(`app/${path}`, { method: "POST", body, headers: { "X-Avsep-Token": this.token } });
    if (!answer.ok) throw new Error((await answer.text()) || `avsep app answers ${answer.status}`);
    return answer;
  }

  /** Give the server a file; gives the name it goes by there. @param {File} file @returns {Promise<string>} */
  async upload(file) {
    return (await this.ask(`files?name=${encodeURIComponent(file.name)}`, file)).text();
  }

  /** The sound of a file as WAV, at its own rate. @param {string} id @param {string} name */
  async sound(id, name) {
    return new File([await (await this.ask("sound", JSON.stringify({ id }))).blob()], name);
  }

  /** @param {string} id @returns {Promise<boolean>} */
  async hasPictures(id) {
    return (await (await this.ask("about", JSON.stringify({ id }))).json()).pictures;
  }

  /** Boxes of objects, by the detector. @param {string} id @param {{ name: string, class: string }[]} sources
   * @returns {Promise<Track[]>} */
  async boxes(id, sources) {
    return (await this.ask("boxes", JSON.stringify({ id, sources }))).json();
  }

  /** What the separator sees of each source, decoded in Python. @param {string} id
   * @param {{ name: string, track: Track }[]} sources @returns {Promise<Timeline[]>} */
  async frames(id, sources) {
    const answer = await this.ask("frames", JSON.stringify({ id, sources }));
    const arrays = await readNpz(new Uint8Array(await answer.arrayBuffer()));
    return sources.map(({ name }, n) => {
      const of = (/** @type {"object" | "motion"} */ role) => {
        const array = arrays[`${n}/${role}`];
        if (!array) return null;
        return { data: /** @type {Uint8Array} */ (array.data), count: array.shape[0], rate: Number(arrays[`${n}/${role}_rate_hz`].data[0]) };
      };
      return { name, object: of("object"), motion: of("motion"), moves: true };
    });
  }

  /** Separate in Python; gives the sounds of the sources and the residual.
   * @param {string} id @param {{ name: string, class: string, track: Track }[]} sources @param {boolean} looks
   * @param {number} channels @param {(text: string, done: number, total: number) => void} progress
   * @param {() => boolean} stopped
   * @returns {Promise<{ sounds: File[], presence: number[] | null, alike: number[][], seconds: number }>} */
  async separate(id, sources, looks, channels, progress, stopped) {
    const { job } = await (await this.ask("separate", JSON.stringify({ id, sources, looks, channels }))).json();
    for (;;) {
      if (stopped()) await this.ask("stop", JSON.stringify({ job }));
      const state = await (await this.ask("state", JSON.stringify({ job }))).json();
      if (state.error) throw new Error(state.error);
      if (state.result) {
        const sounds = [];
        for (let n = 0; n <= sources.length; n += 1) {
          const blob = await (await this.ask("result", JSON.stringify({ job, n }))).blob();
          sounds.push(new File([blob], `${n}.wav`));
        }
        return { sounds, ...state.result };
      }
      progress(state.text, state.done, state.total);
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
  }
}
