// How far does it see? One object on a plain ground, dragged towards the border, and a light: can the class token tell?
"use strict";
live.view("reach", (box, { ground, object }) => {
  const { make, choice, slider, button } = live;
  const EXACT = 1e-12,
    QUADRANTS = ["top left", "top right", "bottom left", "bottom right"];
  // The last PEG of the model with three stands after its last block, where a class token never reads it: two count.
  const MODELS = {
    none: ["no encoding", "none", 0],
    one: ["one PEG", "one-peg", 1],
    two: ["two PEGs", "three-pegs", 2],
    circular: ["one circular PEG", "circular-peg", 0],
    table: ["a learned table", "learned-table", Infinity],
  };
  const usual = { model: "one", tokens: 10, row: 5, column: 2 };
  const { found: at, write } = live.state(usual, box);
  if (!Object.hasOwn(MODELS, at.model)) at.model = usual.model;
  if (![10, 14, 20].includes(at.tokens)) at.tokens = usual.tokens;

  const scene = (row, column) =>
    live.paint(at.tokens, (c, y, x) => (y === row && x === column ? object[c] : ground[c]));
  const middle = () => Math.floor(at.tokens / 2);
  const distance = () => Math.min(at.row, at.column, at.tokens - 1 - at.row, at.tokens - 1 - at.column);

  // ------------------------------------------------------------------ the page's elements

  const stage = make("canvas", {
    className: "live-stage",
    tabIndex: 0,
    role: "application",
    "aria-roledescription": "object that moves",
    "aria-describedby": "live-help",
  });
  const frame = live.framed(stage, at.tokens);
  const clamp = (i) => Math.min(Math.max(Math.round(i), 0), at.tokens - 1);
  const go = (row, column) => ((at.row = clamp(row)), (at.column = clamp(column)), changed());
  const column = slider("column", [0, at.tokens - 1], at.column, (i) => go(at.row, i));
  const row = slider("row", [0, at.tokens - 1], at.row, (i) => go(i, at.column));
  const models = choice(
    "encoding",
    Object.entries(MODELS).map(([key, [words]]) => [key, words]),
    at.model,
    (key) => ((at.model = key), changed()),
  );
  const sizes = choice(
    "grid",
    [10, 14, 20].map((n) => [String(n), `${n} × ${n} tokens${n === 10 ? ", trained" : ""}`]),
    at.tokens,
    (n) => {
      const share = [at.row, at.column].map((i) => i / at.tokens);
      at.tokens = Number(n);
      for (const { control } of [row, column]) control.max = at.tokens - 1;
      go(...share.map((part) => Math.floor(part * at.tokens)));
    },
  );
  const lamp = make("p", { className: "live-lamp" }),
    told = make("p"),
    theorem = make("p"),
    answers = make("ol", { className: "live-answer" });
  const { link, element: share } = live.sharing(),
    marks = make("span", {}, "");
  const key = (colour, words) => {
    const mark = make("span", { className: "live-key" });
    mark.style.background = colour;
    return make("li", {}, mark, words);
  };
  box.replaceChildren(
    live.heading(box, "Can the class token tell?"),
    make("div", { className: "live-controls" }, models.element, sizes.element),
    make(
      "div",
      { className: "live-move" },
      make(
        "div",
        { className: "live-side" },
        frame,
        make(
          "p",
          { id: "live-help", className: "live-help" },
          "Drag the object, click where it should be, or use the arrow keys or the sliders.",
          make("span", { className: "live-touch" }, " Swipe beside it to scroll."),
        ),
        column.element,
        row.element,
        make(
          "p",
          { className: "live-buttons" },
          button("one token towards the left border", () => go(at.row, at.column - 1)),
          button("to the middle", () => go(middle(), middle())),
          share,
        ),
      ),
      make(
        "div",
        { className: "live-told" },
        lamp,
        told,
        theorem,
        make(
          "ul",
          { className: "live-legend" },
          key("#0072b2", marks),
          key("#e69f00", "changed by the object"),
          key("#d61a00", "changed by both"),
        ),
        make("p", { className: "live-help" }, "The model’s answer: in which quarter is the object?"),
        answers,
      ),
    ),
  );
  const say = live.status(box);
  let grabbed = [0, 0];
  live.draggable(stage, {
    start: (event) => {
      const here = stage.getBoundingClientRect(); // the object comes to the pointer
      grabbed = [(event.clientY - here.top) / here.height, (event.clientX - here.left) / here.width].map((part) =>
        Math.floor(part * at.tokens),
      );
      go(...grabbed);
    },
    moved: (x, y) => go(grabbed[0] + at.tokens * y, grabbed[1] + at.tokens * x),
    step: (x, y) => go(at.row + y, at.column + x),
  });

  // ------------------------------------------------------------------ two stains, and the light

  /** Which tokens the border changes, and which the object does: the model's PEGs alone, one after another. */
  function stains(model) {
    const D = model.config.width,
      N = at.tokens ** 2,
      grid = [at.tokens, at.tokens];
    const part = model.config.encoding.find(({ kind }) => kind === "peg");
    if (!part)
      return [
        new Array(N).fill(MODELS[at.model][2] === Infinity),
        Array.from({ length: N }, (_, t) => t === at.row * at.tokens + at.column),
      ];
    const made = new live.engine.VisionTransformer(model.config, model.weights);
    const after = (picture, padding) => {
      let tokens = made.patchEmbed(picture.image, at.tokens, at.tokens);
      for (const position of part.positions.filter((i) => i < model.config.depth - 1)) {
        const layer = `encoding.peg.${position}.proj`;
        tokens = live.engine.peg(
          tokens,
          grid,
          D,
          model.weights[`${layer}.weight`],
          model.weights[`${layer}.bias`],
          padding,
        );
      }
      return tokens;
    };
    const whole = after(scene(at.row, at.column), part.padding);
    const others = [after(scene(at.row, at.column), "circular"), after(scene(-1, -1), part.padding)];
    return others.map((other) =>
      Array.from({ length: N }, (_, t) => {
        for (let i = t * D; i < t * D + D; i++) if (Math.abs(whole[i] - other[i]) > 1e-9) return true;
        return false;
      }),
    );
  }

  function changed() {
    (row.show(at.row), column.show(at.column), write(link));
    frame.style.setProperty("--tokens", at.tokens);
    stage.setAttribute(
      "aria-label",
      `an object in row ${at.row}, column ${at.column} of ${at.tokens} by ${at.tokens} tokens, ${live.some(distance(), "token")} from the border`,
    );
    update();
  }

  const update = live.latest(box, async () => {
    const now = structuredClone(at),
      [words, file, k] = MODELS[now.model],
      d = distance(),
      name = `where-${file}`;
    const model = await live.load(name),
      grid = [now.tokens, now.tokens];
    const here = await live.run(name, scene(now.row, now.column)),
      there = await live.run(name, scene(middle(), middle()));
    if (JSON.stringify(now) !== JSON.stringify(at)) return; // asked again already
    const norm = (x) => Math.sqrt(x.reduce((sum, value) => sum + value * value, 0));
    const change = norm(here.features.map((x, i) => x - there.features[i])) / norm(there.features),
      tells = change > EXACT;
    const [border, thing] = stains(model);
    live.drawTokens(stage, grid, (token) => {
      const base = (token === now.row * now.tokens + now.column ? object : ground).map((x) => 255 * x);
      const over =
        border[token] && thing[token]
          ? [214, 26, 0]
          : border[token]
            ? [0, 114, 178]
            : thing[token]
              ? [230, 159, 0]
              : null;
      return token === now.row * now.tokens + now.column ? base : over ? live.mix(base, over, 0.6) : base;
    });
    const inMiddle = now.row === middle() && now.column === middle();
    const answer = ({ logits }) => logits.indexOf(Math.max(...logits)),
      same = k > 0 && answer(here) === answer(there);
    lamp.dataset.light = tells ? "on" : "off";
    lamp.textContent = inMiddle
      ? "The object is in the middle, with which we compare."
      : !tells
        ? "The class token cannot tell."
        : same
          ? "The class token can tell, too faintly for another answer."
          : "The class token can tell.";
    marks.textContent = k === Infinity ? "marked by the table" : "changed by the border";
    const size = change < 0.01 ? live.scientific(change) : change.toFixed(2);
    told.textContent = inMiddle
      ? ""
      : `The vector that the head reads ${tells ? `changes by ${size} times its length` : "stays the same but for rounding, below 10⁻¹² of its length"}.`;
    told.append(` The object is d\u00a0=\u00a0${d} from the nearest border.`);
    theorem.textContent =
      k === Infinity
        ? "A table marks every token by itself: it can tell everywhere."
        : k === 0
          ? file === "none"
            ? "Nothing marks any place: it can tell nowhere."
            : "Around the border it looks as inside: it can tell nowhere."
          : `The theorem for ${k} PEG${k > 1 ? "s" : ""}: it can tell up to d\u00a0=\u00a0${2 * k - 1}, and no more from d\u00a0=\u00a0${2 * k} on.${k === 2 ? " (This model has a third PEG after its last block, which a class token never reads.)" : ""}`;
    const [best, chance] = live.drawAnswers(answers, here.logits, QUADRANTS, 4);
    const count = (which) => live.some(which.filter(Boolean).length, "token");
    const both = border.map((one, token) => one && thing[token]);
    say(
      `${words}, d = ${d}: ${lamp.textContent} ${count(border)} ${marks.textContent}, ${count(thing)} changed by the object, ${count(both)} by both. Answer: ${best}, ${live.percent(chance)}.`,
    );
    box.dataset.change = change; // for tests
  });

  go(at.row, at.column);
});
