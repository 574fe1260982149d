// Longer sequences: one slider for the grid, from 6 to 24 tokens a side, under models that were trained at 8.
"use strict";
live.view("sizes", (box, { photographs, side: large, classes, accuracy }) => {
  const { make, choice, slider, PICTURES } = live;
  const PATCH = 4,
    TRAINED = 8,
    WIDTH = 96,
    SKY = [0.62, 0.76, 0.9];
  const ROWS = {
    added: "what the encoding adds to the picture (of three PEGs, the first)",
    place: "on plain ground: how far what it adds differs from the middle",
    answer: "the answer",
    recorded: "accuracy on 5,000 photographs, measured at five sizes: five seeds, weights not rounded",
  };
  const usual = { picture: "chelsea", tokens: TRAINED, models: ["learned-table", "one-peg"] };
  const { found: at, write } = live.state(usual, box);
  at.models = usual.models.map((name, i) => (Object.hasOwn(live.COLUMNS, at.models[i]) ? at.models[i] : name));
  if (!Object.hasOwn(PICTURES, at.picture)) at.picture = usual.picture;
  at.tokens = Math.min(Math.max(at.tokens, 6), 24);

  const photo = (tokens) => live.areaResize(live.square(photographs[at.picture], large), PATCH * tokens);
  const plain = (tokens) => live.paint(PATCH * tokens, (c) => SKY[c]);

  // ------------------------------------------------------------------ the page's elements

  const stage = make("canvas", { className: "live-stage", role: "img" }),
    frame = live.framed(stage, TRAINED);
  const tokens = slider("tokens a side", [6, 24], at.tokens, (n) => ((at.tokens = n), changed()));
  const pictures = choice("picture", Object.entries(PICTURES), at.picture, (name) => ((at.picture = name), changed()));
  const { link, element: share } = live.sharing(),
    told = make("p", { className: "live-help" });
  const columns = at.models.map((name, i) => {
    const parts = {
      added: make("canvas", { "aria-hidden": "true" }),
      place: make("canvas", { role: "img", "aria-label": "not computed yet" }),
      answer: make("ol", { className: "live-answer" }),
      recorded: make("table", { className: "live-recorded" }),
    };
    const control = live.columnChoice(i, name, (chosen) => ((at.models[i] = chosen), changed()));
    return { ...parts, control };
  });
  const bodies = Object.entries(ROWS).map(([row, words]) =>
    make(
      "tbody",
      {},
      make("tr", {}, make("th", { colspan: columns.length, scope: "rowgroup" }, words)),
      make("tr", {}, ...columns.map((column) => make("td", {}, column[row]))),
    ),
  );
  box.replaceChildren(
    live.heading(box, "One set of weights, any grid"),
    make("div", { className: "live-controls" }, pictures.element, tokens.element),
    make(
      "div",
      { className: "live-move" },
      make("div", { className: "live-side" }, frame, told, make("p", { className: "live-buttons" }, share)),
      make(
        "table",
        { className: "live-table" },
        make("caption", {}, "Models trained at 8 × 8 tokens; a choice above each column."),
        make("thead", {}, make("tr", {}, ...columns.map(({ control }) => make("th", { scope: "col" }, control)))),
        ...bodies,
      ),
    ),
  );
  const say = live.status(box);

  // ------------------------------------------------------------------ showing it

  /** The recorded accuracies, the one at this size marked. */
  function record(column, name) {
    const rows = Object.entries(accuracy[name] ?? {});
    column.recorded.replaceChildren(
      ...(rows.length ? rows : [["–", null]]).map(([size, value]) =>
        make(
          "tr",
          { className: Number(size) === at.tokens ? "live-now" : "" },
          make("th", { scope: "row" }, value ? `${size} × ${size}` : "not measured"),
          make("td", {}, value ? `${value[0].toFixed(1)} ± ${value[1].toFixed(1)}\u00a0%` : ""),
        ),
      ),
    );
  }

  const painters = {}; // of what a model adds at the trained size: colours mean the same at every size
  function changed() {
    (tokens.show(at.tokens), write(link));
    live.drawPicture(stage, photo(at.tokens));
    frame.style.setProperty("--tokens", at.tokens);
    stage.setAttribute("aria-label", `${PICTURES[at.picture]} at ${PATCH * at.tokens} by ${PATCH * at.tokens} pixels`);
    told.textContent =
      `${PATCH * at.tokens} × ${PATCH * at.tokens} pixels, ${at.tokens} × ${at.tokens} = ${at.tokens ** 2} tokens of ${PATCH} × ${PATCH} pixels` +
      (at.tokens === TRAINED ? ": the trained size." : ".");
    columns.forEach((column, i) => record(column, at.models[i]));
    update();
  }

  const update = live.latest(box, async () => {
    const now = structuredClone(at);
    const words = await Promise.all(now.models.map((name, i) => show(columns[i], name, now)));
    say(`${now.tokens} by ${now.tokens} tokens. ${words.join("; ")}.`);
  });

  async function show(column, name, now) {
    const model = `photographs-${name}`,
      grid = [now.tokens, now.tokens],
      N = now.tokens ** 2;
    const key = `${name} ${now.picture}`;
    if (!painters[key]) {
      const first = await live.run(model, photo(TRAINED));
      painters[key] = first.added.every((x) => x === 0)
        ? () => () => [224, 224, 224]
        : live.painter(first.added, WIDTH);
    }
    const [seen, empty] = [await live.run(model, photo(now.tokens)), await live.run(model, plain(now.tokens))];
    live.drawTokens(column.added, grid, painters[key](seen.added));
    const middle = (Math.floor(now.tokens / 2) * now.tokens + Math.floor(now.tokens / 2)) * WIDTH;
    const differs = Float64Array.from({ length: N }, (_, t) =>
      Math.hypot(...Array.from({ length: WIDTH }, (_, i) => empty.added[t * WIDTH + i] - empty.added[middle + i])),
    );
    const most = Math.max(...differs);
    live.drawShades(column.place, grid, (token) => (most > 1e-9 ? differs[token] / most : 0));
    const marked = differs.filter((x) => x > 1e-9).length;
    column.place.setAttribute("aria-label", `${marked} of ${N} tokens differ from the middle one`);
    const [best, chance] = live.drawAnswers(column.answer, seen.logits, classes);
    return `${live.COLUMNS[name]}: ${marked} of ${N} tokens marked, ${best} ${live.percent(chance)}`;
  }

  changed();
});
