// Move it: a picture that is dragged by pixels under several trained models, and what each makes of it.
"use strict";
live.view("move", (box, { photographs, side: large, classes, rounding }) => {
  const { make, choice, slider, button, PICTURES } = live;
  const SIDE = 32,
    PATCH = 4,
    WIDTH = 96,
    GRID = [8, 8],
    TOKENS = 64,
    SKY = [0.62, 0.76, 0.9];
  const WAYS = { ring: "around a ring", pan: "the camera pans", walk: "it walks on plain ground" };
  const LIMIT = { ring: 16, pan: 8, walk: 12 }; // pixels
  const ROWS = {
    added: "what the encoding adds",
    map: "the map of tokens",
    change: "did the map move along?",
    attention: "what the class token reads",
    answer: "the answer",
  };
  const usual = {
    picture: "chelsea",
    way: "ring",
    x: 4,
    y: 0,
    block: 0,
    models: ["none", "learned-table", "one-peg", "circular-peg"],
  };
  const { found: at, write } = live.state(usual, box);
  at.models = usual.models.map((name, i) => (Object.hasOwn(live.COLUMNS, at.models[i]) ? at.models[i] : name));
  if (!Object.hasOwn(WAYS, at.way)) at.way = usual.way;
  if (!Object.hasOwn(PICTURES, at.picture)) at.picture = usual.picture;
  at.block = Math.min(Math.max(at.block, -2), 5);

  // ------------------------------------------------------------------ what is moved

  let own = null; // the reader's picture, (3, large, large)
  const resized = {};
  const photo = (side) => {
    const key = `${own ? "own" : at.picture} ${side}`;
    return (resized[key] ??= live.areaResize(own ?? live.square(photographs[at.picture], large), side));
  };
  const moved = (right, down) => {
    if (at.way === "ring") return live.slideOnRing(photo(SIDE), right, down);
    if (at.way === "pan") return live.slideWindow(photo(SIDE + 2 * LIMIT.pan), right, down, SIDE);
    return live.placeOn(SKY, SIDE, photo(8), (SIDE - 8) / 2 + right, (SIDE - 8) / 2 + down);
  };

  // ------------------------------------------------------------------ the page's elements

  const stage = make("canvas", {
    className: "live-stage",
    tabIndex: 0,
    role: "application",
    "aria-roledescription": "picture that moves",
    "aria-describedby": "live-help",
  });
  const limits = () => [-LIMIT[at.way], LIMIT[at.way] - (at.way === "ring")];
  const clamp = (x) => {
    // a ring has no end
    if (at.way === "ring") return ((((Math.round(x) + SIDE / 2) % SIDE) + SIDE) % SIDE) - SIDE / 2;
    return Math.min(Math.max(Math.round(x), limits()[0]), limits()[1]);
  };
  const go = (x, y) => ((at.x = clamp(x)), (at.y = clamp(y)), changed());
  const right = slider("pixels right", limits(), at.x, (x) => go(x, at.y));
  const down = slider("pixels down", limits(), at.y, (y) => go(at.x, y));
  const reset = () => ((unmoved = {}), go(at.way === "pan" ? clamp(at.x) : at.x, at.y));
  const pictures = choice("picture", Object.entries(PICTURES), at.picture, (name) => {
    if (name === "own") return;
    ((own = null), (file.value = ""), mine.remove(), (at.picture = name), reset());
  });
  const mine = make("option", { value: "own" }, "your image"),
    wrong = make("p", { className: "live-wrong", role: "alert" });
  const file = make("input", { type: "file", accept: "image/*" });
  const takeOwn = async (taken) => {
    try {
      own = await live.ownPicture(taken, large);
    } catch {
      return void (wrong.textContent = `${taken.name} is no image that this browser can read: choose a PNG, JPEG or WebP file.`);
    }
    wrong.textContent = "";
    pictures.control.append(mine);
    pictures.control.value = "own";
    for (const key of Object.keys(resized)) if (key.startsWith("own")) delete resized[key];
    reset();
  };
  file.addEventListener("change", () => file.files[0] && takeOwn(file.files[0]));
  const ways = choice("how it moves", Object.entries(WAYS), at.way, (way) => {
    at.way = way;
    for (const { control } of [right, down]) [control.min, control.max] = limits();
    reset();
  });
  const blocks = choice(
    "which map",
    [
      ["-2", "what the encoding adds"],
      ["-1", "before block 0"],
      ...[0, 1, 2, 3, 4, 5].map((i) => [String(i), `after block ${i}`]),
    ],
    at.block,
    (block) => ((at.block = Number(block)), changed()),
  );
  const { link, element: share } = live.sharing();

  const columns = at.models.map((name, i) => {
    const parts = Object.fromEntries(
      Object.keys(ROWS).map((row) => [row, make(row === "answer" ? "ol" : "canvas", { className: `live-${row}` })]),
    );
    for (const row of ["added", "map", "change", "attention"]) parts[row].setAttribute("aria-hidden", "true"); // for the eye alone
    parts.change.removeAttribute("aria-hidden");
    (parts.change.setAttribute("role", "img"), parts.change.setAttribute("aria-label", "not computed yet"));
    const control = live.columnChoice(i, name, (chosen) => ((at.models[i] = chosen), changed()));
    return { ...parts, control, exact: make("p"), stays: make("p") };
  });
  const headings = Object.fromEntries(
    Object.entries(ROWS).map(([row, words]) => [
      row,
      make("th", { colspan: columns.length, scope: "rowgroup" }, words),
    ]),
  );
  const bodies = Object.keys(ROWS).map((row) =>
    make(
      "tbody",
      {},
      make("tr", {}, headings[row]),
      make(
        "tr",
        {},
        ...columns.map((column) =>
          make("td", {}, column[row], ...(row === "change" ? [column.exact] : row === "answer" ? [column.stays] : [])),
        ),
      ),
    ),
  );
  const table = make(
    "table",
    { className: "live-table" },
    make(
      "caption",
      {},
      `Trained models, one a column; a choice above each. Their weights are rounded for the page: accuracy moves by ${rounding} points at most.`,
    ),
    make("thead", {}, make("tr", {}, ...columns.map(({ control }) => make("th", { scope: "col" }, control)))),
    ...bodies,
  );
  const help = make(
    "p",
    { id: "live-help", className: "live-help" },
    "Drag the picture, or use its arrow keys (with Shift: by a whole token, 4 pixels) or the sliders.",
    make("span", { className: "live-touch" }, " Swipe beside it to scroll."),
  );
  const summary = make("p", { className: "live-summary" });
  const legend = make(
    "p",
    { className: "live-help" },
    "Did the map move along? Green and hatched: exactly. Red: changed, the redder, the more. Grey: new content, nothing to compare. " +
      "The answer is one of a hundred classes, and models as small as these often miss it.",
  );
  box.replaceChildren(
    live.heading(box, "Move it yourself"),
    make(
      "div",
      { className: "live-controls" },
      pictures.element,
      ways.element,
      blocks.element,
      live.labelled("or your own image, which stays on this page", file, wrong),
    ),
    make(
      "div",
      { className: "live-move" },
      make(
        "div",
        { className: "live-side" },
        live.framed(stage, GRID[0]),
        help,
        right.element,
        down.element,
        summary,
        make(
          "p",
          { className: "live-buttons" },
          button("back to the start", () => go(0, 0)),
          button("one token right", () => go(at.x + PATCH, at.y)),
          share,
        ),
        legend,
      ),
      table,
    ),
  );
  const say = live.status(box);

  // ------------------------------------------------------------------ moving it

  let grabbed = [0, 0];
  live.draggable(stage, {
    start: () => (grabbed = [at.x, at.y]),
    moved: (x, y) => go(grabbed[0] + SIDE * x, grabbed[1] + SIDE * y),
    step: (x, y, far) => go(at.x + x * (far ? PATCH : 1), at.y + y * (far ? PATCH : 1)),
  });
  box.addEventListener("dragover", (event) => event.preventDefault());
  box.addEventListener(
    "drop",
    (event) => (event.preventDefault(), event.dataTransfer.files[0] && takeOwn(event.dataTransfer.files[0])),
  );

  // ------------------------------------------------------------------ showing it

  let unmoved = {}; // model -> what it makes of the picture at its start
  function changed() {
    (right.show(at.x), down.show(at.y), write(link));
    const picture = own ? "your image" : PICTURES[at.picture];
    link.textContent = own ? `link to this view, with ${PICTURES[at.picture]} for your image` : "link to this view";
    stage.setAttribute("aria-label", `${picture}, ${way(at.x, "right", "left")}, ${way(at.y, "down", "up")}`);
    headings.map.textContent =
      at.block < 0 ? "the map of tokens before block 0" : `the map of tokens after block ${at.block} and its PEG`;
    headings.attention.textContent = `what the class token reads in block ${Math.max(at.block, 0)}`;
    bodies[Object.keys(ROWS).indexOf("map")].hidden = at.block === -2; // the row above has it
    live.drawPicture(stage, moved(at.x, at.y));
    update();
  }

  /** "4 pixels left, 1 token" */
  const way = (pixels, ahead, back) => {
    const size = Math.abs(pixels),
      limit = at.way !== "ring" && size === LIMIT[at.way] ? ", the limit" : "";
    return `${live.some(size, "pixel")} ${pixels < 0 ? back : ahead}${size && size % PATCH === 0 ? `, ${live.some(size / PATCH, "token")}` : ""}${limit}`;
  };

  async function compute(name, reference, start, here) {
    const model = `photographs-${name}`;
    reference[name] ??= await live.run(model, start).then((result) => ({ ...result, paint: {} }));
    return live.run(model, here);
  }

  const update = live.latest(box, async () => {
    const now = structuredClone(at),
      reference = unmoved;
    const pictures = [moved(0, 0), moved(now.x, now.y)]; // of now: the reader goes on moving
    const results = await Promise.all(now.models.map((name) => compute(name, reference, ...pictures)));
    if (reference !== unmoved) return; // another picture came in between
    const told = results.map((result, i) => show(columns[i], now, reference[now.models[i]], result));
    const exact = now.models.map((name, i) => `${live.COLUMNS[name]} ${columns[i].exact.textContent.split(" ")[0]}`);
    summary.textContent = `Exact tokens: ${exact.join(", ")}.`;
    say(
      `${way(now.x, "right", "left")}, ${way(now.y, "down", "up")}. ${told.map((words, i) => `${live.COLUMNS[now.models[i]]}: ${words}`).join("; ")}.`,
    );
  });

  function show(column, now, start, result) {
    const name = live.COLUMNS[now.models[columns.indexOf(column)]],
      { paint } = start;
    const nothing = start.added.every((x) => x === 0);
    const painted = (key, vectors) => (paint[key] ??= live.painter(vectors, WIDTH));
    live.drawTokens(column.added, GRID, nothing ? () => [224, 224, 224] : painted("added", start.added)(result.added));
    const map = (made) => (now.block === -2 ? made.added : made.maps[now.block + 1]);
    live.drawTokens(
      column.map,
      GRID,
      now.block === -2 && nothing ? () => [224, 224, 224] : painted(now.block, map(start))(map(result)),
    );
    const change = live.shiftChange(map(start), map(result), now.x, now.y, PATCH, GRID, now.way !== "pan");
    const exact = change.filter((x) => x === 0).length,
      compared = change.filter((x) => !Number.isNaN(x)).length;
    live.drawChange(column.change, GRID, change);
    column.exact.textContent = `${exact} of ${compared} exact`;
    column.change.setAttribute("aria-label", `${exact} of ${compared} tokens of ${name} moved along exactly`);
    const seen = result.attention[Math.max(now.block, 0)],
      heads = seen.length / (TOKENS + 1);
    const read = Float64Array.from({ length: TOKENS }, (_, t) => {
      // the mean of the heads
      let sum = 0;
      for (let h = 0; h < heads; h++) sum += seen[h * (TOKENS + 1) + 1 + t] / heads;
      return sum;
    });
    const most = Math.max(...read);
    live.drawShades(column.attention, GRID, (token) => read[token] / most);
    const [best, chance] = live.drawAnswers(column.answer, result.logits, classes),
      length = Math.hypot(...start.logits);
    const differs = Math.hypot(...result.logits.map((x, k) => x - start.logits[k])) / length;
    column.stays.textContent =
      differs < 1e-12 ? "logits exactly as at the start" : `logits changed by ${live.percent(differs)}`;
    return `${exact} of ${compared} exact, ${best} ${live.percent(chance)}`;
  }

  go(at.x, at.y);
});
