// The playground: one prompt, the host alone and the host with adapters, side by side.
// Texts from the server are put in as text, never as HTML, and nothing is loaded from elsewhere.

const byId = (id) => document.getElementById(id);
const made = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const BOXES = [...document.querySelectorAll("[name=carrier]")];
const EXPERT = BOXES.find((box) => box.value === "expert");
const SIDES = ["plain", "steered"];
const CARRIERS = ["head", "memory", "expert"];
const SHOWN_PROMPT = 240; // characters of the prompt that stand before the text
const NEAR = 0.005; // neighbours of a smaller weight are not shown, but for the first
const FULL_NATS = 3; // a move of so much has the strongest colour

let adapters = []; // {name, carriers, on, strength}
let hostName = null;
let running = null; // an AbortController while text is written
const told = { plain: null, steered: null }; // what each side has written: {tokens, times, run}
let chosen = null; // the token that is explained: {side, place}

// ---- words ----

const visible = (text) =>
  text.replace(/ /g, "␣").replace(/\t/g, "⇥").replace(/\n/g, "↵").replace(/\r/g, "␍") || "∅";

/** A text's name where it is heard: white space alone has signs, which have names. */
const spoken = (text) => text.trim() || visible(text);

const percent = (share) =>
  share >= 0.9995 ? "100 %" : share >= 0.0005 ? `${(100 * share).toFixed(1)} %` : "< 0.1 %";

function howFar(nats) {
  if (nats < 0.05) return "hardly at all";
  if (nats < 0.5) return "a little";
  if (nats < 1.5) return "clearly";
  return "a long way";
}

function inWords(status, message, retryAfter) {
  if (status === 401) return "This server asks for an API key. Enter it at the top right and try again.";
  if (status === 403) return `The server refuses: ${message}.`;
  if (status === 413) return "The prompt is too long for this server. Shorten it.";
  if (status === 429) {
    const wait = retryAfter ? ` Try again in ${retryAfter} s.` : " Try again in a moment.";
    return `The server is busy: ${message}.${wait}`;
  }
  if (status >= 500) return `The server could not answer (${status}): ${message}.`;
  return `The server cannot do that: ${message}.`;
}

// ---- the server ----

class Refused extends Error {
  constructor(status, words) {
    super(words);
    this.status = status;
  }
}

function headers() {
  const key = byId("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function asked(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: headers(), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server cannot be reached. Is `trimtab serve` still running?");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  const message = (body?.error?.message ?? answer.statusText ?? "no reason given").replace(/\.$/, "");
  throw new Refused(answer.status, inWords(answer.status, message, answer.headers.get("retry-after")));
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Refused(500, inWords(500, event.error.message.replace(/\.$/, "")));
      yield event;
    }
  }
}

async function loadModels() {
  const { data } = await (await asked("v1/models")).json();
  hostName = data[0].id;
  const before = new Map(adapters.map((one) => [one.name, one]));
  adapters = data
    .filter((model) => model.id.startsWith(`${hostName}+`))
    .map((model) => {
      const name = model.id.slice(hostName.length + 1);
      const known = before.get(name) ?? { on: true, strength: 1 };
      return { ...known, name, carriers: model.trimtab?.carriers ?? CARRIERS };
    });
  if (!before.size) {
    adapters.forEach((one, place) => (one.on = place === 0));
    // As for a request that names no carriers: all that are served.
    EXPERT.checked = adapters.some((one) => one.carriers.includes("expert"));
  }
  byId("tagline").textContent = `A small model steers ${hostName}. Watch where, and ask why.`;
}

// ---- settings, and the link that holds them ----

const on = () => adapters.filter((one) => one.on);
const served = () => CARRIERS.filter((name) => on().some((one) => one.carriers.includes(name)));
const ticked = () =>
  BOXES.filter((box) => box.checked).map((box) => box.value);
const carriers = () => ticked().filter((name) => served().includes(name));

function request(side) {
  const body = {
    prompt: byId("prompt").value,
    max_tokens: Number(byId("tokens").value),
    temperature: Number(byId("temperature").value),
    seed: Number(byId("seed").value),
    stream: true,
    trimtab: { trace: true },
  };
  if (side === "plain") return { ...body, model: hostName };
  const names = on();
  body.trimtab.carriers = carriers();
  if (names.length > 1) {
    const parts = names.map((one) => `${one.name}:${one.strength}`);
    return { ...body, model: [hostName, ...parts].join("+") };
  }
  body.trimtab.strength = names[0].strength;
  return { ...body, model: `${hostName}+${names[0].name}` };
}

const linked = () => new URLSearchParams(location.hash.slice(1));

function toLink() {
  const state = linked();
  state.set("prompt", byId("prompt").value);
  // Before the server has said what it serves, nothing is chosen but what the link has.
  if (hostName) {
    state.set("adapters", on().map((one) => `${one.name}:${one.strength}`).join(","));
    state.set("carriers", ticked().join(","));
  }
  for (const name of ["temperature", "tokens", "seed"]) state.set(name, byId(name).value);
  return state.toString();
}

function fromLink() {
  const state = linked();
  if (state.has("prompt")) byId("prompt").value = state.get("prompt");
  for (const name of ["temperature", "tokens", "seed"]) {
    const value = Number(state.get(name));
    if (state.has(name) && Number.isFinite(value)) byId(name).value = value;
  }
  if (state.has("carriers")) {
    const wanted = state.get("carriers").split(",");
    // A link that names none of them says nothing about them.
    if (BOXES.some((box) => wanted.includes(box.value))) {
      for (const box of BOXES) box.checked = wanted.includes(box.value);
    }
  }
  if (state.has("adapters")) {
    const wanted = new Map(state.get("adapters").split(",").map((part) => part.split(":")));
    for (const one of adapters) {
      one.on = wanted.has(one.name);
      const strength = Number(wanted.get(one.name));
      if (one.on && strength >= 0 && strength <= 2) one.strength = strength;
    }
  }
  drawAdapters();
  byId("temperature-out").textContent = byId("temperature").value;
}

function keepLink() {
  history.replaceState(null, "", `#${toLink()}`);
}

function drawAdapters() {
  const rows = adapters.map((one) => {
    const row = made("div");
    row.className = "slider";
    const label = made("label");
    label.className = "choice";
    const box = made("input", { type: "checkbox", checked: one.on });
    label.append(box, ` ${one.name}`);
    const slider = made("input", {
      type: "range", min: 0, max: 2, step: 0.05, value: one.strength, disabled: !one.on,
    });
    slider.setAttribute("aria-label", `Strength of ${one.name}`);
    // The slider says its value itself.
    const shown = made("span", { className: "value", ariaHidden: "true" });
    shown.textContent = one.strength.toFixed(2);
    box.addEventListener("change", () => {
      one.on = box.checked;
      slider.disabled = !one.on;
      settleCarriers();
      again();
    });
    slider.addEventListener("input", () => {
      one.strength = Number(slider.value);
      shown.textContent = one.strength.toFixed(2);
      keepLink();
    });
    slider.addEventListener("change", again);
    row.append(label, slider, shown);
    return row;
  });
  const none = made("p", { className: "note" });
  none.textContent = hostName
    ? "None is served. Start the server with --adapter NAME=FOLDER to see what one changes."
    : "The server has not said yet what it serves.";
  byId("adapter-rows").replaceChildren(...(rows.length ? rows : [none]));
  settleCarriers();
}

function settleCarriers() {
  const there = served();
  for (const box of BOXES) {
    box.disabled = !there.includes(box.value);
    box.parentElement.title = box.disabled ? "Not served with the adapters chosen" : "";
  }
  const names = on().map((one) => one.name).join(" + ");
  byId("steered-title").textContent = names ? `The host with ${names}` : "The host, steered";
}

// ---- text as it comes ----

function say(words) {
  byId("status").textContent = words;
}

function complain(words) {
  byId("problem").textContent = words;
  byId("problem").hidden = !words;
}

function begin(side) {
  const text = byId(`${side}-text`);
  const prompt = byId("prompt").value;
  const given = byId(`${side}-given`);
  given.className = "given";
  given.textContent = (prompt.length > SHOWN_PROMPT ? "…" : "") + prompt.slice(-SHOWN_PROMPT);
  text.replaceChildren();
  while (text.nextSibling) text.nextSibling.remove();
  text.classList.add("writing-now");
  text.setAttribute("aria-busy", "true");
  told[side] = { tokens: [], times: [], run: running, question: question() };
  byId(`${side}-rate`).textContent = "";
  if (chosen?.side === side) close();
}

function draw(side, token) {
  const text = byId(`${side}-text`);
  const frame = text.parentElement;
  const atEnd = frame.scrollHeight - frame.scrollTop - frame.clientHeight < 40;
  const span = made("span");
  span.className = token.by;
  token.text.split("\n").forEach((line, number) => {
    // A line break shows a sign that can be pointed at, and is not part of the text.
    if (number) span.append(made("i", { className: "nl" }), "\n");
    span.append(line);
  });
  span.style.setProperty("--a", Math.min(1, Math.sqrt(token.moved_nats / FULL_NATS)).toFixed(3));
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.setAttribute("aria-label", `${spoken(token.text)}, ${token.by}, moved ${token.moved_nats.toFixed(2)} nats`);
  span.tabIndex = -1;
  span.dataset.place = told[side].tokens.push(token) - 1;
  text.append(span);
  // The arrow keys go on from there: one stop for the Tab key, however long the text.
  if (told[side].tokens.length === 1) span.tabIndex = 0;
  if (atEnd) frame.scrollTop = frame.scrollHeight;
}

/** Tokens a second since both columns write: one that begins earlier waits while the other's prompt is read. */
function rate(side) {
  const { tokens, times, run } = told[side];
  const count = `${tokens.length} ${tokens.length === 1 ? "token" : "tokens"}`;
  const together = SIDES.map((one) => told[one]).filter((one) => one?.run === run && one.times.length);
  const from = Math.max(...together.map((one) => one.times[0]));
  const shared = times.filter((time) => time >= from);
  const counted = shared.length > 1 ? shared : times;
  const took = (counted.at(-1) - counted[0]) / 1000;
  return took > 0 ? `${((counted.length - 1) / took).toFixed(1)} tokens/s · ${count}` : count;
}

function receive(side, choice) {
  const now = performance.now();
  let rest = choice.text;
  for (const token of choice.trimtab?.trace ?? []) {
    draw(side, token);
    rest = rest.startsWith(token.text) ? rest.slice(token.text.length) : "";
    told[side].times.push(now);
  }
  // What no token explains: a character that the end cuts.
  if (rest) byId(`${side}-text`).after(rest);
  for (const one of SIDES) if (told[one]) byId(`${one}-rate`).textContent = rate(one);
}

async function write(side, signal) {
  begin(side);
  const text = byId(`${side}-text`);
  try {
    const options = { method: "POST", body: JSON.stringify(request(side)), signal };
    for await (const event of events(await asked("v1/completions", options))) {
      for (const choice of event.choices) receive(side, choice);
    }
  } finally {
    text.classList.remove("writing-now");
    text.setAttribute("aria-busy", "false");
  }
}

function obstacle(sides) {
  if (!hostName) return "The server has not said what it serves. Is it running?";
  if (!byId("prompt").value) return "Write a prompt first: the beginning of a text.";
  for (const name of ["tokens", "seed"]) {
    const { min, max, value } = byId(name);
    if (!byId(name).checkValidity() || value === "") {
      return `${name === "tokens" ? "Most tokens" : "Seed"}: give a whole number from ${min} to ${max}.`;
    }
  }
  if (sides.includes("steered") && !carriers().length) return "Choose at least one carrier that is served.";
  return "";
}

async function run(sides) {
  if (!hostName) await welcome();
  const possible = sides.filter((side) => side === "plain" || on().length);
  const problem = obstacle(possible);
  complain(problem);
  if (problem) return;
  keepLink();
  running?.abort();
  const mine = (running = new AbortController());
  byId("stop").disabled = false;
  say("Writing …");
  const ends = await Promise.allSettled(possible.map((side) => write(side, mine.signal)));
  if (running !== mine) return;
  running = null;
  byId("stop").disabled = true;
  finish(ends, possible);
}

function finish(ends, sides) {
  const failed = ends.find((end) => end.status === "rejected")?.reason;
  if (failed && failed.name !== "AbortError") {
    complain(failed instanceof Refused ? failed.message : "The stream broke off. Try again.");
    say("");
    if (failed.status === 401) askForKey();
    return;
  }
  const parts = sides.map((side) => `${side === "plain" ? "alone" : "steered"}: ${rate(side)}`);
  if (!on().length) parts.push("no adapter is chosen");
  say(`${failed ? "Stopped" : "Done"} (${parts.join("; ")}).`);
}

/** What the host alone is asked, in words. */
function question() {
  return JSON.stringify(request("plain"));
}

/** After a change of what steers: the host alone would say the same as before, if asked the same. */
function again() {
  keepLink();
  if (!told.plain?.tokens.length || !on().length || !carriers().length) return;
  run(running || told.plain.question !== question() ? SIDES : ["steered"]);
}

function askForKey() {
  byId("key-box").open = true;
  byId("key").focus();
}

// ---- one token explained ----

function bars(list, pairs, token) {
  const rows = pairs.map(([text, share]) => {
    const row = made("li");
    const isChosen = text === token.text;
    if (isChosen) row.className = "chosen";
    const code = made("code", { textContent: visible(text), title: visible(text) });
    const bar = made("span", { className: "bar" });
    bar.setAttribute("aria-hidden", "true");
    bar.append(made("i"));
    bar.firstChild.style.width = `${100 * share}%`;
    const number = made("span", { className: "share", textContent: percent(share) });
    row.append(code, bar, number);
    return row;
  });
  list.replaceChildren(...rows);
}

/** The text before a neighbour's place, from a whole line on where it was cut out of more. */
const wholeLines = (text) => (text.length < 80 ? text : text.slice(text.slice(0, -1).indexOf("\n") + 1));

function place(found, token) {
  const item = made("li");
  const where = made("div", { className: "where" });
  const source = made("span", { textContent: `${found.source}, line ${found.line}` });
  const weight = made("span", { textContent: `weight ${Math.round(100 * found.weight)} %` });
  where.append(source, weight);
  const text = made("pre");
  const mark = made("mark");
  const said = token.text && found.after.startsWith(token.text);
  const end = said ? token.text.length : /^\s*\S*/.exec(found.after)[0].length || 1;
  mark.textContent = found.after.slice(0, end);
  text.append(wholeLines(found.before), mark, found.after.slice(end));
  item.append(where, text);
  return item;
}

const CREDIT = {
  host: "most of this token’s probability is what the host alone gives it.",
  head: "a light layer that knows how the small model changed.",
  memory: "which found similar places in the adapter’s text.",
  expert: "the tuned small model that runs beside the host.",
};

function explain(side, number) {
  const token = told[side].tokens[number];
  close();
  chosen = { side, place: number };
  const span = byId(`${side}-text`).querySelector(`[data-place="${number}"]`);
  span.setAttribute("aria-selected", "true");
  const panel = byId("inspector");
  panel.className = token.by;
  const code = made("code", { textContent: visible(token.text) });
  byId("inspector-title").replaceChildren("Token ", code);
  const bold = made("b", { textContent: `Decided by the ${token.by}` });
  const rest = (token.by === "host" ? ": " : ", ") + CREDIT[token.by];
  const moved = ` The distribution moved ${howFar(token.moved_nats)}: ${token.moved_nats.toFixed(2)} nats.`;
  byId("verdict").replaceChildren(bold, rest, side === "steered" ? moved : "");
  bars(byId("before"), token.before, token);
  bars(byId("after"), token.after, token);
  byId("after").parentElement.hidden = side === "plain";
  const near = token.neighbours.filter((one, number) => !number || one.weight >= NEAR);
  byId("neighbours-box").hidden = !near.length;
  byId("neighbours").replaceChildren(...near.map((one) => place(one, token)));
  panel.hidden = false;
  // No further than to the bars: the token stays in sight where the window is high enough.
  panel.querySelector(".bars").scrollIntoView({ block: "nearest" });
  say(`${visible(token.text)}: decided by the ${token.by}, moved ${token.moved_nats.toFixed(2)} nats.`);
}

function close() {
  if (!chosen) return;
  byId(`${chosen.side}-text`).querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  byId("inspector").hidden = true;
  chosen = null;
}

function walk(event, side) {
  const tokens = told[side]?.tokens.length ?? 0;
  const at = Number(event.target.dataset?.place ?? -1);
  const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens - 1 };
  if (event.key in steps && tokens) {
    event.preventDefault();
    focusToken(side, Math.max(0, Math.min(tokens - 1, steps[event.key])));
  } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
    event.preventDefault();
    explain(side, at);
  }
}

function focusToken(side, number) {
  const text = byId(`${side}-text`);
  text.querySelector('[role=option][tabindex="0"]')?.setAttribute("tabindex", "-1");
  const span = text.querySelector(`[data-place="${number}"]`);
  span.tabIndex = 0;
  span.focus();
}

// ---- what the hands do ----

function empty(side, words) {
  Object.assign(byId(`${side}-given`), { className: "empty", textContent: words });
}

async function welcome() {
  try {
    await loadModels();
    complain("");
    byId("key-box").open = false;
    fromLink();
  } catch (error) {
    complain(error.message);
    if (error.status === 401) askForKey();
    drawAdapters();
  }
}

for (const side of SIDES) {
  const text = byId(`${side}-text`);
  text.addEventListener("keydown", (event) => walk(event, side));
  text.addEventListener("click", (event) => {
    const number = event.target.closest("[role=option]")?.dataset.place;
    if (number === undefined) return;
    focusToken(side, Number(number));
    explain(side, Number(number));
  });
}
byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run(SIDES);
});
byId("stop").addEventListener("click", () => running?.abort());
byId("close").addEventListener("click", () => {
  const { side, place: number } = chosen;
  close();
  focusToken(side, number);
});
byId("share").addEventListener("click", async () => {
  keepLink();
  try {
    await navigator.clipboard.writeText(location.href);
    say("Link copied: it holds the prompt and the settings, and no key.");
  } catch {
    say("Copy the address of this page: it holds the prompt and the settings, and no key.");
  }
});
byId("key").addEventListener("change", welcome);
byId("carriers").addEventListener("change", again);
for (const name of ["prompt", "tokens", "seed"]) byId(name).addEventListener("change", keepLink);
byId("temperature").addEventListener("input", () => {
  byId("temperature-out").textContent = byId("temperature").value;
  keepLink();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run(SIDES);
  }
  if (event.key === "Escape") {
    if (running) running.abort();
    else if (chosen) byId("close").click();
  }
});
window.addEventListener("hashchange", fromLink);

empty("plain", "What the host writes by itself appears here.");
empty("steered", "And here, what it writes with the adapter: each token coloured by who decided it.");
welcome();
