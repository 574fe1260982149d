// Predictions that count. A details element with data-choices ("a | b | c"; data-right: one of them) or with
// data-number (data-within: how far off is still right; data-unit) gets a small form above it: choose or
// type, then commit. What was said stays beside the answer, and a tally stands before the exercises. This
// browser alone keeps all of it; where it keeps nothing, the open page does. Without this script the answers
// are there to be opened, as ever. (data-ask: the question in short; data-says is for the tests.)
document.addEventListener("DOMContentLoaded", () => {
  const PREFIX = "cpvt-predictions:";
  const options = typeof DOCUMENTATION_OPTIONS == "object" ? DOCUMENTATION_OPTIONS : {}; // of Sphinx
  const page = options.pagename ?? location.pathname;

  // Access alone throws where storage is blocked, and what is stored may be anything.
  const attempt = (action) => {
    try { return action(); } catch { return null; }
  };
  const load = (key) => Object(attempt(() => JSON.parse(localStorage.getItem(key))));
  const save = () => attempt(() => localStorage.setItem(PREFIX + page, JSON.stringify(made)));
  const made = load(PREFIX + page); // id -> {said, right}, or {looked: true}

  const make = (tag, properties, ...children) => {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(properties))
      key in node ? (node[key] = value) : node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const strong = (text) => make("strong", {}, text);
  const sign = (state) => make("span", { "aria-hidden": "true" }, `${SIGNS[state]} `);
  const status = (className) => make("p", { className, role: "status", tabIndex: -1 });

  const STATES = { right: "right", wrong: "wrong", looked: "looked up", open: "still open" };
  const SIGNS = { right: "✓", wrong: "✗", looked: "–", open: "?" };
  const stateOf = (one) => (!one ? "open" : one.looked ? "looked" : one.right ? "right" : "wrong");
  const counted = (states) =>
    Object.keys(STATES)
      .map((state) => [states.filter((one) => one == state).length, STATES[state]])
      .filter(([count]) => count)
      .map((parts) => parts.join(" "))
      .join(", ");

  const ask = (details) => {
    const { id, dataset } = details, { choices, right, number, within, unit } = dataset;
    const forecast = details.matches(".answer"), list = choices?.split(" | ");
    const value = (text) => (list ? text : `${text} ${unit}`.trim());
    const found = value(list ? right : number);
    const isRight = (said) => (list ? said == found : Math.abs(said - number) <= Number(within) + 1e-9);
    const near = `Within ${within} ${unit == "%" ? "points" : unit}`.trim();
    const margin = Number(within) ? `${near} counts as right.` : "Only the exact number counts as right.";

    const question = dataset.ask ?? (forecast ? "Your prediction" : "Your answer");
    const field = make("fieldset", {}, make("legend", {}, list ? question : "Your prediction"));
    if (list)
      for (const choice of list) {
        const radio = make("input", { type: "radio", name: id, value: choice, required: true });
        field.append(make("label", {}, radio, make("span", {}, choice)));
      }
    else {
      const kind = { type: "number", step: "any", inputMode: "decimal" };
      const box = make("input", { ...kind, name: id, required: true });
      field.append(make("label", { className: "prediction-number" }, `${question}: `, box, ` ${unit}`));
    }
    const button = make("button", {}, forecast ? "This is my prediction" : "This is my answer");
    const form = make("form", { autocomplete: "off" }, field, button);
    const verdict = status("prediction-verdict");
    const whole = make("div", { className: "prediction", id: `mine-${id}` }, form, verdict);
    // Above the answer, whose own next neighbour is the blurred result; in an exercise below the question.
    (forecast ? details : details.closest("section").querySelector(".cell") ?? details).before(whole);
    const asked = whole.previousElementSibling; // the question itself, for who hears the form alone
    if (asked?.matches("p")) {
      asked.id ||= `asked-${id}`;
      field.setAttribute("aria-describedby", asked.id);
    }

    const show = () => {
      const one = made[id], state = stateOf(one);
      form.hidden = state != "open";
      verdict.dataset.state = state;
      verdict.replaceChildren();
      if (state == "looked")
        verdict.append(`You opened the ${forecast ? "answer" : "solution"} first.`);
      if (!("said" in Object(one))) return;
      const said = ` You said: ${value(one.said)}.`;
      verdict.append(sign(state), strong(one.right ? "Right." : "Not right."), said);
      if (!list || !one.right) verdict.append(` ${forecast ? "Found" : "Answer"}: `, strong(found), ".");
      if (!list) verdict.append(` (${margin})`);
      if (!forecast) verdict.append(" The solution below says why.");
    };
    const decide = (how) => {
      made[id] = how;
      save();
      show();
      count();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const said = new FormData(form).get(id);
      if (forecast) details.open = true;
      decide({ said, right: isRight(said) });
      verdict.focus({ preventScroll: true }); // the button, where the focus was, is gone
    });
    details.querySelector("summary").addEventListener("click", () => {
      if (!details.open && !made[id]) decide({ looked: true });
    });
    const reworded = list && "said" in Object(made[id]) && !list.includes(made[id].said);
    if (reworded) delete made[id];
    if (made[id] && forecast) details.open = true;
    show();
    const restart = () => {
      delete made[id];
      form.reset();
      details.open = false;
      show();
    };
    return { details, forecast, restart, state: () => stateOf(made[id]) };
  };

  const asked = [...document.querySelectorAll("details[data-choices], details[data-number]")];
  let count = () => {};
  const questions = asked.map(ask);
  const article = document.querySelector(".bd-article");

  if (questions.length) {
    const said = make("div", {}), done = status("prediction-done");
    const again = make("button", { type: "button" });
    again.textContent = "Forget these and start the chapter again";
    const kinds = { prediction: (one) => one.forecast, "exercise question": (one) => !one.forecast };
    const title = (details) => {
      const heading = details.closest("section").querySelector("h1, h2, h3").cloneNode(true);
      for (const extra of heading.querySelectorAll(".section-number, .headerlink")) extra.remove();
      return heading.textContent.trim();
    };
    count = () => {
      const lines = Object.entries(kinds).map(([kind, belongs]) => [kind, questions.filter(belongs)]);
      said.replaceChildren();
      for (const [kind, ones] of lines.filter(([, ones]) => ones.length)) {
        const total = `${ones.length} ${kind}${ones.length > 1 ? "s" : ""}: `;
        const items = ones.map(({ details, state, forecast }, i) => {
          const name = `${forecast ? `Prediction ${i + 1}: ` : ""}${title(details)}`;
          const link = make("a", { href: `#mine-${details.id}` }, name);
          return make("li", {}, make("span", {}, sign(state()), STATES[state()]), link);
        });
        const sum = strong(`${total}${counted(ones.map((one) => one.state()))}.`);
        said.append(make("p", {}, sum), make("ul", {}, ...items));
      }
      again.hidden = !Object.keys(made).length;
      done.textContent = "";
    };
    again.addEventListener("click", () => {
      for (const one of questions) one.restart();
      for (const key of Object.keys(made)) delete made[key];
      attempt(() => localStorage.removeItem(PREFIX + page));
      count();
      done.textContent = "Forgotten. All questions of this chapter are open again.";
      done.focus({ preventScroll: true });
    });
    const named = { className: "prediction-tally", "aria-label": "Your predictions" };
    const tally = make("aside", named, said, again, done);
    const exercises = document.getElementById("exercises");
    exercises ? exercises.before(tally) : article.append(tally);
    count();
  }

  // The front page: one line over all chapters, once there is something to count.
  const place = page == "book/index" && document.querySelector("#the-book > p");
  const stored = (place && attempt(() => Object.keys(localStorage))) || [];
  const keys = stored.filter((key) => key.startsWith(PREFIX));
  const all = keys.flatMap((key) => Object.entries(load(key)).filter(([id]) => id.startsWith("predict-")));
  if (all.length) {
    const line = status("prediction-sum"), forget = make("button", { type: "button" }, "Forget them");
    line.append(`Your predictions so far: ${counted(all.map(([, one]) => stateOf(one)))}. `, forget);
    forget.addEventListener("click", () => {
      for (const key of keys) attempt(() => localStorage.removeItem(key));
      line.textContent = "Forgotten.";
      line.focus({ preventScroll: true });
    });
    place.after(line);
  }
});
