// Boxes over a video: drawn with a pointer, moved and sized with a pointer or the keyboard.

/** @typedef {import("./track.js").Box} Box */

const STEP = 0.02;
const LEAST = 0.04; // of a side
const NEAR = 0.01; // an edge so near to the frame's is drawn onto it

/** @param {number} value */
const clamp = (value) => (value < NEAR ? 0 : value > 1 - NEAR ? 1 : value);
const percent = (/** @type {number} */ value) => `${Math.round(100 * value)} %`;

/** A box for each source over the element `stage`. */
export class BoxEditor {
  /** @param {HTMLElement} stage @param {(n: number, box: Box) => void} changed */
  constructor(stage, changed) {
    this.stage = stage;
    this.changed = changed;
    /** @type {{ name: string, box: Box, node: HTMLElement }[]} */
    this.items = [];
    this.chosen = 0;
    stage.addEventListener("pointerdown", (event) => this.grab(event));
  }

  /** @param {string[]} names @param {Box[]} boxes */
  show(names, boxes) {
    const focused = this.items.findIndex(({ node }) => node === document.activeElement);
    this.items.forEach(({ node }) => node.remove());
    this.items = names.map((name, n) => {
      const node = document.createElement("div");
      node.className = "box";
      node.tabIndex = 0;
      node.setAttribute("role", "group");
      node.style.setProperty("--mine", `var(--c${n % 6})`);
      const label = document.createElement("span");
      label.textContent = name;
      const grip = document.createElement("i");
      node.append(label, grip);
      node.addEventListener("focus", () => this.choose(n));
      node.addEventListener("keydown", (event) => this.key(event, n));
      this.stage.append(node);
      return { name, box: boxes[n], node };
    });
    this.choose(Math.min(this.chosen, names.length - 1));
    this.place();
    if (focused >= 0) this.items[Math.min(focused, this.items.length - 1)]?.node.focus();
  }

  /** @param {Box[]} boxes */
  move(boxes) {
    boxes.forEach((box, n) => (this.items[n].box = box));
    this.place();
  }

  /** @param {number} n */
  choose(n) {
    this.chosen = Math.max(0, n);
    this.items.forEach(({ node }, k) => node.classList.toggle("chosen", k === this.chosen));
  }

  place() {
    for (const { name, box, node } of this.items) {
      node.style.width = `${100 * (box[2] - box[0])}%`;
      node.style.height = `${100 * (box[3] - box[1])}%`;
      node.style.left = `${100 * box[0]}%`;
      node.style.top = `${100 * box[1]}%`;
      const [left, top, right, bottom] = box.map(percent);
      node.setAttribute(
        "aria-label",
        `Box of ${name}: left ${left}, top ${top}, right ${right}, bottom ${bottom}. Arrow keys move it, with Shift ` +
          "they size it.",
      );
    }
  }

  /** @param {number} n @param {Box} box */
  set(n, box) {
    this.items[n].box = box;
    this.place();
    this.changed(n, box);
  }

  /** @param {KeyboardEvent} event @param {number} n */
  key(event, n) {
    const across = { ArrowLeft: -STEP, ArrowRight: STEP }[event.key] ?? 0;
    const down = { ArrowUp: -STEP, ArrowDown: STEP }[event.key] ?? 0;
    if (!across && !down) return;
    event.preventDefault();
    const [l, t, r, b] = this.items[n].box;
    if (event.shiftKey) {
      this.set(n, [l, t, Math.max(l + LEAST, clamp(r + across)), Math.max(t + LEAST, clamp(b + down))]);
      return;
    }
    const dx = Math.max(-l, Math.min(1 - r, across));
    const dy = Math.max(-t, Math.min(1 - b, down));
    this.set(n, [l + dx, t + dy, r + dx, b + dy]);
  }

  /** @param {PointerEvent} event */
  grab(event) {
    if (!this.items.length || event.button !== 0) return;
    const frame = this.stage.getBoundingClientRect();
    const at = (/** @type {PointerEvent} */ e) => [clamp((e.clientX - frame.left) / frame.width), clamp((e.clientY - frame.top) / frame.height)];
    const [x, y] = at(event);
    const target = /** @type {HTMLElement} */ (event.target);
    const hit = this.items.findIndex(({ node }) => node === target || node.contains(target));
    const whole = (/** @type {Box} */ [l, t, r, b]) => r - l > 0.98 && b - t > 0.98;
    // a box that is the whole frame is drawn anew, unless it is taken by its grip
    const drawing = hit < 0 || (whole(this.items[hit].box) && target.tagName !== "I");
    const n = drawing ? this.chosen : hit;
    this.choose(n);
    this.items[n].node.focus({ preventScroll: true });
    const [l, t, r, b] = this.items[n].box;
    const sizing = !drawing && target.tagName === "I";
    event.preventDefault();
    const drag = (/** @type {PointerEvent} */ e) => {
      const [u, v] = at(e);
      if (drawing) {
        if (Math.abs(u - x) < LEAST || Math.abs(v - y) < LEAST) return;
        this.set(n, [Math.min(u, x), Math.min(v, y), Math.max(u, x), Math.max(v, y)]);
      } else if (sizing) {
        this.set(n, [l, t, Math.max(l + LEAST, u), Math.max(t + LEAST, v)]);
      } else {
        const dx = Math.max(-l, Math.min(1 - r, u - x));
        const dy = Math.max(-t, Math.min(1 - b, v - y));
        this.set(n, [l + dx, t + dy, r + dx, b + dy]);
      }
    };
    const drop = () => {
      window.removeEventListener("pointermove", drag);
      window.removeEventListener("pointerup", drop);
      window.removeEventListener("pointercancel", drop);
    };
    window.addEventListener("pointermove", drag);
    window.addEventListener("pointerup", drop);
    window.addEventListener("pointercancel", drop);
  }
}
