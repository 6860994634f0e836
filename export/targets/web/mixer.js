// The controls of a player: sounds in step with one another and with a video, each muted or heard alone.

/** @typedef {import("./player.js").Player} Player */
/** @typedef {{ play: HTMLElement, seek: HTMLInputElement, clock: HTMLElement, video: HTMLVideoElement | null }} Controls */

/** @param {number} seconds */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds + 1e-6));
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

const LATE_S = 0.08; // that the video may be off while it plays

export class Mixer {
  /** @param {Player} player whose first voice is the recording as it is, and not one of its parts
   * @param {HTMLElement[]} nodes one of each voice, with its buttons (data-key: "muted" or "solo"), and a .view to press
   * @param {Controls} controls @param {(error: Error) => void} failed @param {(time: number) => void} [moved] */
  constructor(player, nodes, controls, failed, moved = () => {}) {
    this.player = player;
    this.nodes = nodes;
    this.controls = controls;
    this.failed = failed;
    this.moved = moved;
    this.seconds = player.total / player.rate;
    this.next = 0;
    controls.seek.max = String(this.seconds);
    player.onend = () => this.tick();
    nodes.forEach((node, n) => {
      for (const button of /** @type {NodeListOf<HTMLElement>} */ (node.querySelectorAll("button[data-key]"))) {
        const key = /** @type {"muted" | "solo"} */ (button.dataset.key);
        button.addEventListener("click", () => {
          player.voices[n][key] = !player.voices[n][key];
          button.setAttribute("aria-pressed", String(player.voices[n][key]));
          this.balance();
        });
      }
      const view = node.querySelector(".view");
      view?.addEventListener("click", (event) => {
        const frame = view.getBoundingClientRect();
        this.goTo((this.seconds * (/** @type {MouseEvent} */ (event).clientX - frame.left)) / frame.width);
      });
    });
    this.balance();
    this.tick();
  }

  balance() {
    const { player, nodes } = this;
    player.balance();
    const solo = player.voices.some((voice) => voice.solo);
    nodes.forEach((node, n) => {
      const voice = player.voices[n];
      node.classList.toggle("off", n > 0 && (solo ? !voice.solo : voice.muted));
    });
  }

  /** Bring playheads, clock and video to the player's time. */
  tick() {
    cancelAnimationFrame(this.next); // one chain of them, whoever calls
    const { player, seconds } = this;
    const { play, seek, clock: said, video } = this.controls;
    const { time, playing } = player;
    for (const node of this.nodes) {
      const head = /** @type {HTMLElement | null} */ (node.querySelector(".head"));
      if (head) head.style.left = `${(100 * time) / seconds}%`;
    }
    seek.value = String(time);
    seek.setAttribute("aria-valuetext", `${time.toFixed(1)} of ${seconds.toFixed(1)} seconds`);
    said.textContent = `${clock(time)} / ${clock(seconds)}`;
    play.textContent = playing ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(playing));
    if (video) {
      if (playing !== !video.paused) playing ? video.play().catch(() => {}) : video.pause();
      if (Math.abs(video.currentTime - time) > (playing ? LATE_S : 0.01) && !video.seeking) {
        video.currentTime = Math.min(time, video.duration || time);
      }
    }
    this.moved(time);
    if (playing) this.next = requestAnimationFrame(() => this.tick());
  }

  toggle() {
    if (this.player.playing) this.player.pause();
    else this.player.play().catch(this.failed);
    this.tick();
  }

  /** @param {number} time */
  goTo(time) {
    this.player.seek(time).catch(() => {});
    this.tick();
  }

  close() {
    cancelAnimationFrame(this.next);
    this.player.close();
  }
}

/** Let the controls, and the space bar where nothing else takes it, move the mixer that is there.
 * @param {Omit<Controls, "video">} controls @param {() => Mixer | null} mixer */
export function listenTo({ play, seek }, mixer) {
  play.addEventListener("click", () => mixer()?.toggle());
  seek.addEventListener("input", () => mixer()?.goTo(Number(seek.value)));
  addEventListener("keydown", (event) => {
    const typing = /** @type {HTMLElement} */ (event.target).closest("input, select, button, summary, textarea, a, .box");
    if (event.key !== " " || typing || !play.checkVisibility()) return;
    event.preventDefault();
    mixer()?.toggle();
  });
}
