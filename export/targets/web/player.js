// Plays several signals in step, from blobs, a few seconds at a time: no long recording lies in memory as a whole.

const SEGMENT_S = 2;
const AHEAD_S = 4;
const AT_ONCE_S = 0.05;

/** @typedef {{ samples: Blob, muted: boolean, solo: boolean, gain?: GainNode }} Voice interleaved float32 */

export class Player {
  /** @param {Voice[]} voices @param {number} channels @param {number} rate @param {number} total samples
   * @param {number} gain of all */
  constructor(voices, channels, rate, total, gain) {
    this.voices = voices;
    this.channels = channels;
    this.rate = rate;
    this.total = total;
    this.gain = gain;
    this.playing = false;
    this.place = 0; // the next sample to be scheduled, or where it stands still
    this.began = { at: 0, sample: 0 }; // the context's time at which a sample sounds
    this.turn = 0; // counts starts and stops: what was read for an earlier one is dropped
    /** @type {AudioContext | null} */
    this.context = null;
    /** @type {Set<AudioBufferSourceNode>} */
    this.sounding = new Set();
    this.onend = () => {};
    this.onbegin = (/** @type {number} */ at) => {}; // the context's time at which the first sample will sound
  }

  /** Seconds from the beginning. */
  get time() {
    if (!this.playing || !this.context) return this.place / this.rate;
    const passed = Math.max(0, this.context.currentTime - this.began.at);
    return Math.min(this.began.sample / this.rate + passed, this.total / this.rate);
  }

  /** Which voices are heard: those on solo, else those that are not muted. */
  balance() {
    const solo = this.voices.some((voice) => voice.solo);
    for (const voice of this.voices) {
      const heard = solo ? voice.solo : !voice.muted;
      voice.gain?.gain.setTargetAtTime(heard ? this.gain : 0, this.context?.currentTime ?? 0, 0.01);
    }
  }

  /** Let it play in a context of the signals' rate, into a node of it. @param {AudioNode} node */
  into(node) {
    const context = /** @type {AudioContext} */ (node.context);
    this.context = context;
    for (const voice of this.voices) {
      const gain = context.createGain();
      gain.connect(node);
      voice.gain = gain;
    }
  }

  async play() {
    if (this.playing) return;
    if (!this.context) {
      // at the signals' rate: pieces that are resampled one by one would click where they meet
      this.into(new AudioContext({ sampleRate: this.rate }).destination);
      for (const { gain } of this.voices) if (gain) gain.gain.value = 0; // they fade in
    }
    if (this.place >= this.total) this.place = 0;
    this.playing = true;
    await /** @type {AudioContext} */ (this.context).resume();
    this.balance();
    await this.run();
  }

  async run() {
    const context = /** @type {AudioContext} */ (this.context);
    const turn = (this.turn += 1);
    const length = Math.round(SEGMENT_S * this.rate);
    let first = true;
    while (this.playing && turn === this.turn) {
      const start = this.place;
      if (start >= this.total) {
        const left = this.began.at + (this.total - this.began.sample) / this.rate - context.currentTime;
        await new Promise((resolve) => setTimeout(resolve, Math.max(0, 1000 * left) + 20));
        if (turn === this.turn && this.playing) {
          this.playing = false;
          this.onend();
        }
        return;
      }
      const end = Math.min(start + length, this.total);
      const width = 4 * this.channels;
      const pieces = await Promise.all(
        this.voices.map(async (v) => new Float32Array(await v.samples.slice(start * width, end * width).arrayBuffer())),
      );
      if (turn !== this.turn) return;
      if (first) {
        // on a whole sample, since between two of them a browser would interpolate; at the beginning of 128 of them
        const quantum = 128 / this.rate;
        this.began = { at: Math.ceil((context.currentTime + AT_ONCE_S) / quantum) * quantum, sample: start };
        this.onbegin(this.began.at);
      }
      first = false;
      const when = this.began.at + (start - this.began.sample) / this.rate;
      pieces.forEach((piece, n) => {
        const buffer = context.createBuffer(Math.min(this.channels, 2), end - start, this.rate);
        for (let c = 0; c < buffer.numberOfChannels; c += 1) {
          const into = buffer.getChannelData(c);
          for (let k = 0; k < into.length; k += 1) into[k] = piece[k * this.channels + c] ?? 0;
        }
        const node = context.createBufferSource();
        node.buffer = buffer;
        node.connect(/** @type {GainNode} */ (this.voices[n].gain));
        node.onended = () => this.sounding.delete(node);
        this.sounding.add(node);
        node.start(when);
      });
      this.place = end;
      const early = this.began.at + (end - this.began.sample) / this.rate - context.currentTime - AHEAD_S;
      if (early > 0) await new Promise((resolve) => setTimeout(resolve, 1000 * early));
    }
  }

  pause() {
    this.place = Math.round(this.time * this.rate);
    this.playing = false;
    this.silence();
  }

  silence() {
    this.turn += 1;
    for (const node of this.sounding) node.stop();
    this.sounding.clear();
  }

  /** @param {number} time in seconds */
  async seek(time) {
    const was = this.playing;
    if (was) this.silence();
    this.place = Math.max(0, Math.min(Math.round(time * this.rate), this.total));
    if (was) await this.run();
  }

  close() {
    this.playing = false;
    this.silence();
    this.context?.close();
    this.context = null;
  }
}
