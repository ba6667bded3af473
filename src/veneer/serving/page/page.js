// The page: one prompt, answered by two to four adapters at once. Text is only ever set as text.

import { ServerError, events, fetchJson, send } from "./events.js";

const FEWEST = 2;
const MOST = 4;
const REFRESH = 3000;

const byId = (id) => document.getElementById(id);
const state = { key: sessionStorage.getItem("veneer-key") ?? "", models: [], base: "", running: null, columns: [], told: "" };

class Column {
  constructor(model) {
    this.root = byId("column").content.firstElementChild.cloneNode(true);
    this.model.value = model;
    const id = `model-${Column.made++}`;
    this.model.id = id;
    this.root.querySelector("label").htmlFor = id;
    this.root.querySelector(".close").addEventListener("click", () => remove(this));
    // A list shows what fits to the text that is there: it is emptied to show all.
    this.model.addEventListener("focus", () => this.model.select());
    byId("columns").append(this.root);
    this.text = "";
  }

  get model() { return this.root.querySelector(".model"); }
  get answer() { return this.root.querySelector(".answer"); }

  clear() {
    this.text = "";
    this.answer.textContent = "";
    for (const name of ["first", "rate", "tokens", "digest"]) this.tell(name, "–");
    this.root.classList.add("busy");
  }

  tell(name, text) { this.root.querySelector(`.${name}`).textContent = text; }

  take(event) {
    if (event.adapter) this.tell("digest", event.adapter.split("@")[1] ?? "the base");
    if (event.text) {
      this.text += event.text;
      this.answer.append(event.text);
      this.answer.scrollTop = this.answer.scrollHeight;
    }
    if (event.error) this.fail(event.error.message);
    if (event.timing) this.finish(event);
  }

  finish({ timing, usage, finish_reason: reason }) {
    this.root.classList.remove("busy");
    this.tell("first", `${Math.round(timing.first_token_seconds * 1000)} ms`);
    this.tell("rate", timing.tokens_per_second === null ? "–" : timing.tokens_per_second.toFixed(1));
    this.tell("tokens", `${usage.completion_tokens}${reason === "length" ? ", cut off" : ""}`);
  }

  fail(message) {
    this.root.classList.remove("busy");
    const line = document.createElement("p");
    line.className = "wrong";
    line.textContent = message;
    this.answer.append(line);
  }

  show(reference) {
    if (reference === null) {
      this.answer.textContent = this.text;
      return;
    }
    this.answer.textContent = "";
    for (const [word, same] of compared(words(this.text), words(reference))) {
      if (same) this.answer.append(word);
      else {
        const mark = document.createElement("mark");
        mark.textContent = word;
        this.answer.append(mark);
      }
    }
  }
}
Column.made = 0;

const words = (text) => text.match(/\s+|[^\s]+/g) ?? [];

// Yields each word with whether it is part of the longest common sequence of both.
function* compared(own, other) {
  const width = other.length + 1;
  if (own.length * width > 4e6) {
    for (const word of own) yield [word, true];
    return;
  }
  const table = new Uint16Array((own.length + 1) * width);
  for (let i = own.length - 1; i >= 0; i--)
    for (let j = other.length - 1; j >= 0; j--)
      table[i * width + j] =
        own[i] === other[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  let j = 0;
  for (let i = 0; i < own.length; i++) {
    while (j < other.length && own[i] !== other[j] && table[i * width + j + 1] >= table[(i + 1) * width + j]) j++;
    const same = j < other.length && own[i] === other[j];
    yield [own[i], same || !own[i].trim()];
    if (same) j++;
  }
}

function say(text, wrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

function add() {
  const taken = new Set(state.columns.map((column) => column.model.value));
  const next = state.models.find((name) => !taken.has(name)) ?? state.models[0] ?? "";
  state.columns.push(new Column(next));
  arrange();
}

function remove(column) {
  state.columns = state.columns.filter((other) => other !== column);
  column.root.remove();
  arrange();
}

function arrange() {
  byId("more").disabled = state.columns.length >= MOST;
  for (const column of state.columns)
    column.root.querySelector(".close").hidden = state.columns.length <= FEWEST;
}

function body() {
  const prompt = byId("prompt").value;
  const asked = {
    models: state.columns.map((column) => column.model.value.trim()),
    ...(byId("chat").checked ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
  };
  const seed = byId("seed").valueAsNumber;
  return Number.isNaN(seed) ? asked : { ...asked, seed };
}

function mark() {
  const on = byId("differences").checked;
  state.columns.forEach((column, index) => column.show(on && index ? state.columns[0].text : null));
}

async function run(event) {
  event.preventDefault();
  if (state.running) {
    state.running.abort();
    return;
  }
  const columns = [...state.columns];
  state.running = new AbortController();
  byId("run").textContent = "Stop";
  byId("differences").checked = false;
  columns.forEach((column) => column.clear());
  say("");
  try {
    const response = await send("v1/compare", state.key, "POST", body(), state.running.signal);
    for await (const part of events(response)) {
      if (part.index === undefined) throw new ServerError(part.error.message);
      columns[part.index].take(part);
    }
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
  } finally {
    columns.forEach((column) => column.root.classList.remove("busy"));
    byId("run").textContent = "Compare";
    state.running = null;
  }
}

async function copyCurl() {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = state.key ? ` -H "authorization: Bearer $VENEER_KEY"` : "";
  const address = new URL("v1/compare", location.href).href;
  const line = `curl -N ${quote(address)} -H 'content-type: application/json'${key} -d ${quote(JSON.stringify(body()))}`;
  try {
    await navigator.clipboard.writeText(line);
    say("Copied.");
  } catch {
    say(line);
  }
}

async function loadModels() {
  try {
    const { data } = await fetchJson("v1/models", state.key);
    // Adapters come before the base.
    const parts = [data.filter((model) => model.parent !== null), data.filter((model) => model.parent === null)];
    state.models = parts.flat().map((model) => model.id);
    state.base = parts[1][0]?.id ?? "";
    byId("base").textContent = state.base ? `on ${state.base}` : "";
    byId("models").replaceChildren(...state.models.map((name) => new Option("", name)));
    say("");
  } catch (error) {
    say(error.status === 401 ? "This server asks for an API key." : error.message, true);
    if (error.status === 401) byId("key").focus();
  }
}

const size = (bytes) => (bytes === null ? "–" : bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function cell(row, text, name = "td") {
  const item = document.createElement(name);
  item.textContent = text;
  row.append(item);
  return item;
}

function rowOf(adapter, changeable) {
  const row = document.createElement("tr");
  cell(row, adapter.name, "th").scope = "row";
  cell(row, adapter.state + (adapter.resident ? ", loaded" : "") + (adapter.pinned ? ", pinned" : ""));
  cell(row, adapter.method === null ? "–" : adapter.rank ? `${adapter.method}, rank ${adapter.rank}` : adapter.method);
  cell(row, size(adapter.memory_bytes ?? adapter.bytes)).title = adapter.resident ? "in memory" : "on the disk";
  cell(row, adapter.requests);
  if (adapter.error) cell(row, adapter.error).className = "why";
  else {
    const code = document.createElement("code");
    code.textContent = adapter.digest === null ? "–" : `${adapter.version}: ${adapter.digest.slice(7, 19)}`;
    cell(row, "").append(code);
  }
  const actions = cell(row, "");
  actions.className = "actions";
  const path = `v1/adapters/${adapter.name.split("/").map(encodeURIComponent).join("/")}`;
  actions.append(button(adapter.pinned ? "Unpin" : "Pin", `${path}/${adapter.pinned ? "unpin" : "pin"}`, "POST"));
  if (changeable) actions.append(button("Remove", `${path}?drain=30`, "DELETE"));
  return row;
}

function button(text, path, method) {
  const item = document.createElement("button");
  item.type = "button";
  item.textContent = text;
  item.addEventListener("click", async () => {
    item.disabled = true;
    await change(path, method);
  });
  return item;
}

async function change(path, method, sent) {
  try {
    await fetchJson(path, state.key, method, sent);
    say("");
  } catch (error) {
    say(error.message, true);
  }
  await Promise.all([loadAdmin(), loadModels()]);
}

async function loadAdmin() {
  let told = null;
  try {
    told = await fetchJson("v1/adapters", state.key);
  } catch {
    // The key is none for adapters: the table is not for it.
  }
  byId("admin").hidden = told === null;
  if (told === null) return;
  byId("register").hidden = !told.changeable;
  const text = JSON.stringify(told);
  if (text === state.told) return;
  // A table that is rebuilt under the pointer or the keyboard loses both.
  if (byId("rows").contains(document.activeElement) && !document.activeElement.disabled) return;
  state.told = text;
  byId("rows").replaceChildren(...told.data.map((adapter) => rowOf(adapter, told.changeable)));
}

async function register(event) {
  event.preventDefault();
  await change("v1/adapters", "POST", { name: byId("new-name").value, source: byId("new-source").value });
}

async function useKey(event) {
  event?.preventDefault();
  if (event) state.key = byId("key").value.trim();
  sessionStorage.setItem("veneer-key", state.key);
  await Promise.all([loadModels(), loadAdmin()]);
  for (const column of state.columns) column.model.value ||= state.models[state.columns.indexOf(column)] ?? "";
}

byId("key").value = state.key;
byId("access").addEventListener("submit", useKey);
byId("ask").addEventListener("submit", run);
byId("more").addEventListener("click", add);
byId("curl").addEventListener("click", copyCurl);
byId("register").addEventListener("submit", register);
byId("differences").addEventListener("change", mark);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});

await useKey();
while (state.columns.length < Math.max(FEWEST, Math.min(3, state.models.length))) add();
setInterval(() => byId("admin").hidden || document.hidden || loadAdmin(), REFRESH);
document.body.dataset.ready = "true";
