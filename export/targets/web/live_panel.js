// What the page shows while somebody listens: the controls of each part, the delay, and what came too late.

/** @typedef {import("./live.js").Live} Live */
/** @typedef {import("./live_processor.js").LiveReport} LiveReport */

const REMEMBERED = 2000; // blocks whose computing is counted
const TOO_SLOW = 0.5; // share of silence from which more buffering does not help
const QUIETEST_DB = -60;

/** The value below which `share` of them lie. @param {number[]} values @param {number} share */
function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** @template {HTMLElement} T @param {string} tag @param {Record<string, string>} [attributes] @param {string} [text]
 * @returns {T} */
function make(tag, attributes = {}, text = "") {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return /** @type {T} */ (node);
}

const db = (/** @type {number} */ peak) => Math.max(QUIETEST_DB, 20 * Math.log10(peak + 1e-9));
const ms = (/** @type {number} */ value) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));

export class LivePanel {
  /** @param {Live} live @param {string[]} names of its voices, the rest last
   * @param {{ tracks: HTMLElement, facts: HTMLElement, said: HTMLElement, clock: HTMLElement }} places */
  constructor(live, names, places) {
    this.live = live;
    this.places = places;
    /** @type {number[]} */
    this.computed = [];
    this.last = { at: 0, missing: 0, dropouts: 0 };
    /** @type {HTMLMeterElement[]} */
    this.meters = [];
    this.rows = names.map((name, n) => this.row(name, n, names.length));
    places.tracks.replaceChildren(...this.rows);
    places.facts.replaceChildren();
    const fact = (/** @type {string} */ term) => {
      const value = make("dd");
      const pair = make("div");
      pair.append(make("dt", {}, term), value);
      places.facts.append(pair);
      return value;
    };
    this.delay = fact("Delay in all");
    fact("The separator's window").textContent = `${ms(live.windowMs)} ms`;
    fact("Buffering").textContent = `${ms(live.bufferingMs)} ms`;
    this.browser = fact("The browser's output, as it tells");
    this.computing = fact(`Computing ${ms(live.blockMs)} ms of sound`);
    this.spare = fact("Blocks come early by, at least");
    this.dropouts = fact("Dropouts");
    this.balance();
  }

  /** The controls of a voice. @param {string} name @param {number} n @param {number} count */
  row(name, n, count) {
    const voice = this.live.voices[n];
    const row = make("div", { class: "track" });
    row.style.setProperty("--mine", n === count - 1 ? "var(--c5)" : `var(--c${n % 6})`);
    const head = make("div", { class: "name" });
    /** @type {HTMLMeterElement} */
    const meter = make("meter", { min: String(QUIETEST_DB), max: "0", value: String(QUIETEST_DB), "aria-label": `Level of ${name} in decibels` });
    this.meters.push(meter);
    /** @type {HTMLInputElement} */
    const volume = make("input", { type: "range", min: "0", max: "150", step: "5", value: "100", "aria-label": `Volume of ${name}`, "aria-valuetext": "100 %" });
    volume.addEventListener("input", () => {
      voice.volume = Number(volume.value) / 100;
      volume.setAttribute("aria-valuetext", `${volume.value} %`);
      this.balance();
    });
    const buttons = make("div", { class: "push" });
    for (const [key, text] of /** @type {["muted" | "solo", string][]} */ ([["muted", "Mute"], ["solo", "Solo"]])) {
      const button = make("button", { type: "button", class: "quiet", "aria-pressed": "false", "aria-label": `${text}: ${name}` }, text);
      button.addEventListener("click", () => {
        voice[key] = !voice[key];
        button.setAttribute("aria-pressed", String(voice[key]));
        this.balance();
      });
      buttons.append(button);
    }
    head.append(make("span", { class: "dot", "aria-hidden": "true" }), make("h3", {}, name), meter, volume, buttons);
    row.append(head);
    return row;
  }

  balance() {
    this.live.balance();
    const solo = this.live.voices.some((voice) => voice.solo);
    this.live.voices.forEach((voice, n) => this.rows[n].classList.toggle("off", solo ? !voice.solo : voice.muted));
  }

  /** @param {LiveReport} report */
  show({ at, missing, dropouts, reserve, ms: computed, peaks }) {
    const { live, places } = this;
    const rate = live.context.sampleRate;
    this.meters.forEach((meter, n) => (meter.value = db(peaks[n] ?? 0)));
    const seconds = Math.floor(at / rate);
    places.clock.textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    this.delay.textContent = `${ms(live.windowMs + live.bufferingMs + live.browserMs)} ms`;
    this.browser.textContent = `${ms(live.browserMs)} ms`;
    this.computed = [...this.computed, ...computed].slice(-REMEMBERED);
    if (this.computed.length) {
      const [median, p99] = [0.5, 0.99].map((share) => `${quantile(this.computed, share).toFixed(1)} ms`);
      this.computing.textContent = `median ${median}, p99 ${p99}`;
    }
    if (Number.isFinite(reserve)) this.spare.textContent = reserve < 0 ? "too late" : `${ms((1000 * reserve) / rate)} ms`;
    const lost = missing - this.last.missing;
    const share = lost / Math.max(1, at - this.last.at);
    if (dropouts > this.last.dropouts || share > 0) {
      places.said.textContent =
        share > TOO_SLOW
          ? "This computer does not keep up: silence is played where a block is late. Close other programs."
          : "Some blocks were late, and silence was played in their place: more buffering helps.";
    }
    this.dropouts.textContent = dropouts ? `${dropouts}, ${ms((1000 * missing) / rate)} ms of silence` : "none";
    this.last = { at, missing, dropouts };
  }
}
