// A cell tagged frames-RxC holds small multiples: R rows and C columns of equal frames. This shows one frame at a
// time, chosen by a slider that the mouse, a finger or the arrow keys move; a button brings all of them back. It
// begins with the frame of the tag frames-start-I. Without this script all of them are simply there.
document.addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll("[class*='tag_frames-']")) {
    const shape = cell.className.match(/tag_frames-(\d+)x(\d+)/);
    const images = [...cell.querySelectorAll("img")]; // one for light pages, one for dark
    if (!shape || !images.length) continue;
    const [, rows, columns] = shape.map(Number), total = rows * columns;
    const first = Number((cell.className.match(/tag_frames-start-(\d+)/) ?? [0, 0])[1]);
    const view = Object.assign(document.createElement("div"), { className: "frames-view" });
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: total - 1 });
    const button = Object.assign(document.createElement("button"), { type: "button" });
    const bar = Object.assign(document.createElement("div"), { className: "frames-bar" });
    const count = document.createElement("output");
    slider.value = first;
    slider.setAttribute("aria-label", `frame, 1 to ${total}: ${images[0].alt}`);

    const show = (whole) => {
      const i = Number(slider.value);
      view.classList.toggle("frames-all", whole);
      button.textContent = whole ? "one frame" : "all frames";
      button.setAttribute("aria-pressed", String(whole));
      count.textContent = `${i + 1} of ${total}`;
      slider.setAttribute("aria-valuetext", count.textContent);
      const across = -(100 * (i % columns)) / columns, down = -(100 * Math.floor(i / columns)) / rows;
      for (const image of images) {
        image.style.width = whole ? "" : `${100 * columns}%`;
        image.style.transform = whole ? "" : `translate(${across}%, ${down}%)`;
      }
    };
    view.style.aspectRatio = `${images[0].getAttribute("width") / columns} / ${images[0].getAttribute("height") / rows}`;
    images[0].before(view);
    view.append(...images);
    view.after(bar);
    bar.append(slider, count, button);
    slider.addEventListener("input", () => show(false));
    button.addEventListener("click", () => show(!view.classList.contains("frames-all")));
    show(false);
  }
});
