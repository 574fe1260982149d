// A cell tagged frames-RxC holds small multiples: R rows and C columns of equal frames. This shows one frame at a
// time, chosen by a slider that the mouse, a finger or the arrow keys move; a button brings all of them back.
// Without this script all of them are simply there.
document.addEventListener("DOMContentLoaded", () => {
  const WIDTH = 7.0, PAD = 0.1; // inches: those of cpvt/lab/interactive.py
  for (const cell of document.querySelectorAll("[class*='tag_frames-']")) {
    const [, rows, columns] = cell.className.match(/tag_frames-(\d+)x(\d+)/).map(Number);
    const image = cell.querySelector("img");
    if (!image) continue;
    const canvas = document.createElement("canvas");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: rows * columns - 1, value: 0 });
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: "all frames" });
    const bar = Object.assign(document.createElement("div"), { className: "frames-bar" });
    const count = document.createElement("output");
    slider.setAttribute("aria-label", `frame, 1 to ${rows * columns}: ${image.alt}`);
    canvas.setAttribute("role", "img");
    canvas.className = "frames-view";

    const show = (whole) => {
      image.hidden = !whole;
      canvas.hidden = whole;
      button.textContent = whole ? "one frame" : "all frames";
      button.setAttribute("aria-pressed", String(whole));
      const i = Number(slider.value);
      count.textContent = `${i + 1} of ${rows * columns}`;
      slider.setAttribute("aria-valuetext", count.textContent);
      canvas.setAttribute("aria-label", `${image.alt} Frame ${count.textContent}.`);
      const inch = image.naturalWidth / (WIDTH + 2 * PAD), pad = PAD * inch;
      const wide = (image.naturalWidth - 2 * pad) / columns, high = (image.naturalHeight - 2 * pad) / rows;
      canvas.width = Math.round(2 * wide);
      canvas.height = Math.round(2 * high);
      canvas.getContext("2d").drawImage(
        image, pad + (i % columns) * wide, pad + Math.floor(i / columns) * high, wide, high, 0, 0, canvas.width, canvas.height);
    };
    const start = () => {
      image.before(canvas);
      canvas.after(bar);
      bar.append(slider, count, button);
      slider.addEventListener("input", () => show(false));
      button.addEventListener("click", () => show(!image.hidden ? false : true));
      show(false);
    };
    image.complete && image.naturalWidth ? start() : image.addEventListener("load", start, { once: true });
  }
});
