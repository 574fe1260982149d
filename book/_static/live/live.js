// What the live views share: models and photographs that come as scripts, workers, pictures that move, maps drawn on
// a canvas, controls, the state in the address. Names of functions are those of cpvt/lab/shifting.py.
const live = (() => {
  "use strict";
  const here = new URL(".", document.currentScript.src).href,
    EXACT = 1e-12;

  // ------------------------------------------------------------------ scripts that bring models and data

  const arrived = {},
    expected = {};
  const FIRST = 0x1000,
    CHARACTERS = 15 ** 4; // as in book/_ext/live_models.py

  /** models/NAME.js, once -> what it brought. */
  function load(name) {
    return (expected[name] ??= new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = `${here}models/${name}.js`;
      script.onload = () => (arrived[name] ? resolve(arrived[name]) : reject(Error(`${name}: empty`)));
      script.onerror = () => reject(Error(`the model ${name} did not load`));
      document.head.append(script);
    }));
  }

  const data = (found) =>
    (arrived.data = {
      ...found,
      photographs: Object.fromEntries(
        Object.entries(found.photographs).map(([name, bytes]) => [
          name,
          Float64Array.from(atob(bytes), (c) => c.charCodeAt(0) / 255),
        ]),
      ),
    });

  /** A number of 15 bits: half precision without its last bit. */
  function fromFifteenBits(code) {
    const exponent = (code >> 9) & 31,
      fraction = (code & 511) / 512;
    return (code >> 14 ? -1 : 1) * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
  }

  /** Called by each models/NAME.js; tensors: [name, shape, levels], in the order of their numbers in the text. */
  function model(name, config, tensors, text) {
    let at = 0;
    const next = () => text.charCodeAt(at++) - FIRST,
      weights = {};
    for (const [key, shape, levels] of tensors) {
      const values = (weights[key] = new Float64Array(shape.reduce((a, b) => a * b, 1)));
      if (!levels) {
        for (let i = 0; i < values.length; i++) values[i] = fromFifteenBits(next());
        continue;
      }
      const sizes = shape[0] === 1 ? shape.slice(1) : shape,
        row = values.length / sizes[0];
      const scales = Array.from({ length: sizes[0] }, () => fromFifteenBits(next()));
      const top = (levels - 1) / 2,
        group = Math.round(Math.log(CHARACTERS) / Math.log(levels));
      for (let i = 0, code; i < values.length; i++, code = Math.floor(code / levels)) {
        if (i % group === 0) code = next();
        values[i] = ((code % levels) - top) * scales[Math.floor(i / row)];
      }
    }
    arrived[name] = { name, config, weights };
  }

  // ------------------------------------------------------------------ workers: the page stays smooth

  const workers = {};
  let asked = 0;
  const answer = ({ data: { id, name, model, picture, options } }) => {
    if (model) models[name] = new VisionTransformer(model.config, model.weights);
    if (picture)
      postMessage({ id, result: models[name].forward(picture.image, picture.height, picture.width, options) });
  };

  /** The model `name` on a picture {image, height, width} -> what its `forward` gives (vit.js). */
  async function run(name, picture, options) {
    const { config, weights } = await load(name);
    if (!workers[name]) {
      const source = `const { VisionTransformer } = (${visionTransformer})(), models = {}; onmessage = ${answer};`;
      const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      worker.postMessage({ name, model: { config, weights } });
      worker.waiting = new Map();
      worker.onmessage = ({ data: { id, result } }) => (worker.waiting.get(id)(result), worker.waiting.delete(id));
      workers[name] = worker;
    }
    return new Promise((resolve) => {
      workers[name].waiting.set(++asked, resolve);
      workers[name].postMessage({ id: asked, name, picture, options });
    });
  }

  /** A function that runs `work` again and again while somebody asks, never twice at once, the last wish last. */
  function latest(box, work) {
    let busy = false,
      again = false;
    return async () => {
      if (busy) return void (again = true);
      box.ariaBusy = busy = true;
      try {
        do ((again = false), await work());
        while (again);
      } catch (error) {
        box.append(make("p", { className: "live-wrong", role: "alert" }, `The live view stopped: ${error.message}.`));
      } finally {
        box.ariaBusy = busy = false;
      }
    };
  }

  // ------------------------------------------------------------------ pictures: {image (3, height, width), height, width}

  const square = (image, side) => ({ image, height: side, width: side });

  /** Each pixel the mean of the area under it. */
  function areaResize({ image, width: old }, side) {
    const out = new Float64Array(3 * side * side),
      scale = old / side;
    const shares = (i) => {
      const found = [];
      for (let j = Math.floor(i * scale); j < Math.min(old, Math.ceil((i + 1) * scale - 1e-9)); j++)
        found.push([j, (Math.min(j + 1, (i + 1) * scale) - Math.max(j, i * scale)) / scale]);
      return found;
    };
    const along = Array.from({ length: side }, (_, i) => shares(i));
    for (let c = 0; c < 3; c++)
      for (let y = 0; y < side; y++)
        for (let x = 0; x < side; x++)
          for (const [v, a] of along[y])
            for (const [u, b] of along[x]) out[(c * side + y) * side + x] += a * b * image[(c * old + v) * old + u];
    return square(out, side);
  }

  /** A new picture: pixel (c, y, x) is what `from` says of it. */
  function paint(side, from) {
    const image = new Float64Array(3 * side * side);
    for (let i = 0; i < image.length; i++)
      image[i] = from(Math.floor(i / side / side), Math.floor(i / side) % side, i % side);
    return square(image, side);
  }

  const pixel = ({ image, width, height }, c, y, x) => image[(c * height + y) * width + x];
  const around = (i, n) => ((i % n) + n) % n;

  /** So many pixels to the right and down; what leaves on one side comes back on the other. */
  const slideOnRing = (picture, right, down = 0) =>
    paint(picture.width, (c, y, x) =>
      pixel(picture, c, around(y - down, picture.height), around(x - right, picture.width)),
    );

  /** A square of a larger scene, in its middle at (0, 0); the content moves right and down, and new content comes in. */
  function slideWindow(scene, right, down, side) {
    const first = Math.floor((scene.width - side) / 2);
    return paint(side, (c, y, x) => pixel(scene, c, first - down + y, first - right + x));
  }

  /** The ground [r, g, b], so many pixels a side, with the subject on it. */
  const placeOn = (ground, side, subject, left, top) =>
    paint(side, (c, y, x) => {
      const inside = y >= top && y < top + subject.height && x >= left && x < left + subject.width;
      return inside ? pixel(subject, c, y - top, x - left) : ground[c];
    });

  /** An image file of the reader's -> a picture; it never leaves the page. */
  async function ownPicture(file, side) {
    const bitmap = await createImageBitmap(file),
      cut = Math.min(bitmap.width, bitmap.height);
    const canvas = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white"; // where the image is transparent
    context.fillRect(0, 0, side, side);
    context.drawImage(bitmap, (bitmap.width - cut) / 2, (bitmap.height - cut) / 2, cut, cut, 0, 0, side, side);
    const { data: bytes } = context.getImageData(0, 0, side, side);
    return paint(side, (c, y, x) => bytes[4 * (y * side + x) + c] / 255);
  }

  // ------------------------------------------------------------------ did it move along?

  /** Maps (N, D) of a picture and of the same moved -> (N): how far each token is from what it would be if the map had
   * moved along, relative to the size of a token; 0 exactly where it did, NaN where new content came in. A shift by a
   * fraction of a token is held against the nearest whole ones. */
  function shiftChange(before, after, right, down, patch, [H, W], wrap = true) {
    const whole = (pixels) => [...new Set([Math.floor(pixels / patch), Math.ceil(pixels / patch)])];
    const D = before.length / H / W,
      size = Math.sqrt(before.reduce((sum, x) => sum + x * x, 0) / H / W) || 1e-30;
    let best = null,
      least = Infinity;
    for (const s of whole(down))
      for (const t of whole(right)) {
        const change = new Float64Array(H * W);
        let error = 0;
        for (let row = 0; row < H; row++)
          for (let column = 0; column < W; column++) {
            const r = row - s,
              c = column - t,
              token = row * W + column;
            if (!wrap && (r < 0 || r >= H || c < 0 || c >= W)) {
              change[token] = NaN;
              continue;
            }
            const from = (around(r, H) * W + around(c, W)) * D;
            let sum = 0;
            for (let i = 0; i < D; i++) sum += (after[token * D + i] - before[from + i]) ** 2;
            const found = Math.sqrt(sum) / size;
            change[token] = found < EXACT ? 0 : found;
            error += change[token] ** 2;
          }
        if (error < least) ((best = change), (least = error));
      }
    return best;
  }

  /** Vectors (N, D) -> a painter of such vectors: their three main directions as red, green and blue. */
  function painter(vectors, D) {
    const N = vectors.length / D,
      mean = new Float64Array(D),
      axes = [];
    for (let i = 0; i < vectors.length; i++) mean[i % D] += vectors[i] / N;
    const rest = vectors.map((x, i) => x - mean[i % D]);
    const along = (axis) =>
      Float64Array.from({ length: N }, (_, t) => axis.reduce((sum, a, i) => sum + a * rest[t * D + i], 0));
    for (let n = 0; n < 3; n++) {
      // power iteration, each direction at a right angle to those before
      let axis = Float64Array.from({ length: D }, (_, i) => Math.cos((i + 1) * (n + 1)));
      for (let turn = 0; turn < 60; turn++) {
        const seen = along(axis),
          next = new Float64Array(D);
        for (let i = 0; i < rest.length; i++) next[i % D] += seen[Math.floor(i / D)] * rest[i];
        for (const other of axes) {
          const dot = other.reduce((sum, a, i) => sum + a * next[i], 0);
          other.forEach((a, i) => (next[i] -= dot * a));
        }
        const length = Math.hypot(...next) || 1;
        axis = next.map((x) => x / length);
      }
      axes.push(axis.reduce((a, b) => a + b) < 0 ? axis.map((x) => -x) : axis);
    }
    const spread = axes.map((axis) => along(axis).map(Math.abs).sort()[Math.floor(0.97 * (N - 1))] || 1);
    return (found) => (token) =>
      axes.map((axis, n) => {
        const value = axis.reduce((sum, a, i) => sum + a * (found[token * D + i] - mean[i]), 0);
        return 255 * Math.min(Math.max(0.5 + (0.5 * value) / spread[n], 0), 1);
      });
  }

  // ------------------------------------------------------------------ drawing

  const CELL = 12; // canvas pixels a token
  const mix = (from, to, share) => from.map((x, i) => x + (to[i] - x) * share);

  /** A picture, one canvas pixel a pixel. */
  function drawPicture(canvas, { image, height, width }) {
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d"),
      shown = context.createImageData(width, height),
      n = width * height;
    for (let i = 0; i < n; i++)
      for (let c = 0; c < 4; c++) shown.data[4 * i + c] = c < 3 ? Math.round(255 * image[c * n + i]) : 255;
    context.putImageData(shown, 0, 0);
  }

  /** A map of tokens; colour(token) -> [r, g, b] of 255, or [r, g, b, "hatched"]. */
  function drawTokens(canvas, [H, W], colour) {
    Object.assign(canvas, { width: W * CELL, height: H * CELL });
    const context = canvas.getContext("2d");
    for (let token = 0; token < H * W; token++) {
      const [r, g, b, hatched] = colour(token),
        x = (token % W) * CELL,
        y = Math.floor(token / W) * CELL;
      context.fillStyle = `rgb(${r} ${g} ${b})`;
      context.fillRect(x, y, CELL, CELL);
      if (!hatched) continue;
      context.strokeStyle = "#00734f";
      context.beginPath();
      for (const shift of [0, CELL / 2]) (context.moveTo(x + shift, y + CELL), context.lineTo(x + CELL, y + shift));
      (context.moveTo(x, y + CELL / 2), context.lineTo(x + CELL / 2, y));
      context.stroke();
    }
  }

  /** A map of changes: green and hatched where exact, else the redder the larger, grey where nothing can be compared. */
  function drawChange(canvas, grid, change, low = 1e-2, high = 1) {
    drawTokens(canvas, grid, (token) => {
      const value = change[token];
      if (value === 0) return [184, 227, 204, "hatched"];
      if (Number.isNaN(value)) return [204, 204, 204];
      const share = Math.log(Math.min(Math.max(value, low), high) / low) / Math.log(high / low);
      return share < 0.5
        ? mix([254, 226, 188], [252, 141, 89], 2 * share)
        : mix([252, 141, 89], [170, 10, 10], 2 * share - 1);
    });
  }

  /** Values from 0 to 1, pale to dark. */
  const drawShades = (canvas, grid, value) =>
    drawTokens(canvas, grid, (token) => mix([247, 246, 251], [63, 0, 125], Math.min(Math.max(value(token), 0), 1)));

  // ------------------------------------------------------------------ controls

  /** An element: make("p", { className: "x" }, "text", child, ...). */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties))
      name.includes("-") || name === "role" || name === "for" || name === "colspan"
        ? element.setAttribute(name, value)
        : (element[name] = value);
    element.append(...children);
    return element;
  }

  let controls = 0;
  function labelled(label, control, ...more) {
    control.id = `live-control-${++controls}`;
    return make("div", { className: "live-control" }, make("label", { for: control.id }, label), control, ...more);
  }

  function choice(label, options, value, changed) {
    const control = make(
      "select",
      {},
      ...options.map(([key, words]) => make("option", { value: key, selected: key === String(value) }, words)),
    );
    control.addEventListener("change", () => changed(control.value));
    return { element: labelled(label, control), control };
  }

  function slider(label, [min, max], value, changed) {
    const control = make("input", { type: "range", min, max, value }),
      shown = make("output", { "aria-live": "off" }, String(value));
    const show = (number) => ((control.value = number), (shown.textContent = number));
    let before; // a finger that meant to scroll sets nothing
    control.addEventListener("pointerdown", () => (before = Number(shown.textContent)));
    control.addEventListener("pointercancel", () => changed(before));
    control.addEventListener("input", () => (show(control.value), changed(Number(control.value))));
    return { element: labelled(label, control, shown), control, show };
  }

  const button = (words, clicked) => {
    const element = make("button", { type: "button" }, words);
    element.addEventListener("click", clicked);
    return element;
  };

  /** A canvas with the borders of its patches. */
  function framed(canvas, tokens) {
    const frame = make("div", { className: "live-frame" }, canvas);
    frame.style.setProperty("--tokens", tokens);
    return frame;
  }

  /** The stage is dragged: moved(x, y) in parts of its width since the drag began; and the arrow keys: step(x, y, far). */
  function draggable(stage, { start, moved, step }) {
    let from = null;
    stage.addEventListener("pointerdown", (event) => {
      stage.setPointerCapture(event.pointerId);
      ((from = [event.clientX, event.clientY]), start?.(event));
    });
    stage.addEventListener("pointermove", (event) => {
      if (from)
        moved((event.clientX - from[0]) / stage.clientWidth, (event.clientY - from[1]) / stage.clientWidth, event);
    });
    for (const name of ["pointerup", "pointercancel"]) stage.addEventListener(name, () => (from = null));
    stage.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (way) (event.preventDefault(), step(...way, event.shiftKey));
    });
  }

  /** The title of a view, and the view as a place with that name. */
  function heading(box, words) {
    box.setAttribute("role", "group");
    box.setAttribute("aria-labelledby", "live-title");
    return make("p", { className: "live-title", id: "live-title" }, words);
  }

  /** A link whose address brings the view back; following it copies the address, where the browser allows that. */
  function sharing() {
    const link = make("a", { href: "#live" }, "link to this view"),
      done = make("span", { role: "status" });
    link.addEventListener("click", (event) => {
      event.preventDefault();
      history.replaceState(null, "", link.hash);
      const tell = (words) => ((done.textContent = words), setTimeout(() => (done.textContent = ""), 4000));
      (navigator.clipboard?.writeText(location.href) ?? Promise.reject()).then(
        () => tell(" copied"),
        () => tell(" it is in the address bar"),
      );
    });
    return { link, element: make("span", {}, link, done) };
  }

  /** Words for a screen reader, said when the reader has stopped changing things. */
  function status(box) {
    const element = make("p", { role: "status", className: "live-status" });
    box.append(element);
    let timer;
    return (words) => {
      clearTimeout(timer);
      element.dataset.waiting = "";
      timer = setTimeout(() => (delete element.dataset.waiting, (element.textContent = words)), 400);
    };
  }

  /** 0.00066 -> 6.6 × 10⁻⁴ */
  function scientific(x) {
    const [digits, exponent] = x.toExponential(1).split("e");
    return `${digits} × 10${[...exponent.replace("+", "")].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`;
  }

  const some = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const percent = (x) => `${Math.round(100 * x)}\u00a0%`;

  /** The likeliest answers as a list with bars. */
  function drawAnswers(list, logits, names, count = 3) {
    const chances = Float64Array.from(logits);
    engine.softmax(chances, 0, chances.length);
    const best = [...chances.keys()].sort((a, b) => chances[b] - chances[a]).slice(0, count);
    list.replaceChildren(
      ...best.map((k) => {
        const bar = make("span", { className: "live-bar" });
        bar.style.inlineSize = `${100 * chances[k]}%`;
        return make("li", {}, `${names[k]} ${percent(chances[k])}`, bar);
      }),
    );
    return [names[best[0]], chances[best[0]]];
  }

  /** Models of the photographs: file -> name, short enough for the head of a column on a phone. */
  const COLUMNS = {
    none: "none",
    "learned-table": "table",
    "one-peg": "one PEG",
    "three-pegs": "three PEGs",
    "circular-peg": "circular",
  };

  /** The head of a column: which model it shows. */
  function columnChoice(i, name, changed) {
    const options = Object.entries(COLUMNS).map(([key, words]) =>
      make("option", { value: key, selected: key === name }, words),
    );
    const control = make("select", { "aria-label": `model of column ${i + 1}` }, ...options);
    control.addEventListener("change", () => changed(control.value));
    return control;
  }

  const PICTURES = { chelsea: "a cat", coffee: "a cup of coffee", astronaut: "an astronaut", rocket: "a rocket" };

  // ------------------------------------------------------------------ state in the address

  /** The state: what the view starts with, over that what its box says (data-block="0"), over that what the address
   * says. Written back when it changes. */
  function state(usual, box) {
    usual = Object.fromEntries(
      Object.entries(usual).map(([name, value]) => [
        name,
        typeof value === "number" ? Number(box.dataset[name] ?? value) : value,
      ]),
    );
    const said = location.hash.startsWith("#live?")
      ? new URLSearchParams(location.hash.slice(6))
      : new URLSearchParams();
    const found = Object.fromEntries(
      Object.entries(usual).map(([name, value]) => {
        const text = said.get(name);
        if (text === null) return [name, value];
        if (typeof value === "number") return [name, Number.isFinite(Number(text)) ? Math.round(Number(text)) : value];
        return [name, Array.isArray(value) ? text.split("~") : text];
      }),
    );
    let timer;
    const write = (link) => {
      const text = Object.entries(found)
        .filter(([name, value]) => String(value) !== String(usual[name]))
        .map(([name, value]) => `${name}=${encodeURIComponent(Array.isArray(value) ? value.join("~") : value)}`)
        .join("&");
      link.href = `#live?${text}`;
      clearTimeout(timer);
      timer = setTimeout(
        () =>
          history.replaceState(null, "", text || location.hash.startsWith("#live?") ? `#live?${text}` : location.href),
        400,
      );
    };
    return { found, write };
  }

  /** Runs `start(box, data)` for the view's box, once the reader comes near it. */
  function view(name, start) {
    const box = document.querySelector(`.live[data-view="${name}"]`);
    if (!box) return;
    const begin = () =>
      load("data")
        .then(() => start(box, arrived.data))
        .catch((error) => box.replaceChildren(make("p", {}, `The live view cannot start: ${error.message}.`)));
    if (location.hash.startsWith("#live?")) begin().then(() => box.scrollIntoView());
    else {
      const seen = new IntersectionObserver(
        (entries) => entries.some((entry) => entry.isIntersecting) && (seen.disconnect(), begin()),
        { rootMargin: "300px" },
      );
      seen.observe(box);
    }
  }

  const engine = visionTransformer();
  /** A model that did not come as a file counts as loaded: for tests. */
  const given = (name) => (expected[name] = Promise.resolve(arrived[name]));

  return {
    data,
    model,
    given,
    load,
    run,
    latest,
    labelled,
    square,
    areaResize,
    paint,
    slideOnRing,
    slideWindow,
    placeOn,
    ownPicture,
    shiftChange,
    painter,
    drawPicture,
    drawTokens,
    drawChange,
    drawShades,
    mix,
    make,
    choice,
    slider,
    button,
    draggable,
    status,
    percent,
    scientific,
    some,
    heading,
    sharing,
    framed,
    COLUMNS,
    PICTURES,
    columnChoice,
    drawAnswers,
    state,
    view,
    engine,
  };
})();
