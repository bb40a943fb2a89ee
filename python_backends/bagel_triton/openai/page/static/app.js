// The page: it sends requests, shows a turn for each, and stops them.

import { complete, health, modelName, setApiKey } from "./api.js";
import { Composer } from "./composer.js";
import { toBody } from "./request.js";
import { Turn } from "./turn.js";

const POLL_MS = 3000;
const $ = (id) => document.getElementById(id);

let model = "bagel";
let turns = [];
let conversation = []; // the turns that a text request continues
let running = null; // { turn, controller }

function announce(text) {
  $("announcer").textContent = text;
}

function status(state, text) {
  $("dot").dataset.state = state;
  $("server").textContent = text;
}

/** Show how the server is, and look again until it is ready. */
async function connect() {
  try {
    const { ready, message } = await health();
    if (ready) {
      model = await modelName();
      $("key-form").hidden = true;
      status("ready", model);
      document.title = `BAGEL: ${model}`;
      return;
    }
    status("loading", "Loading the model");
    $("server").title = message;
  } catch (error) {
    if (error.status === 401) {
      askForKey();
      return;
    }
    status("down", "No connection");
  }
  setTimeout(connect, POLL_MS);
}

function askForKey() {
  status("down", "API key needed");
  $("key-form").hidden = false;
  $("key").focus();
}

const history = () => conversation.flatMap((turn) => [toBody(turn.request, model).messages.at(-1), turn.reply]);

function showContext() {
  const goesOn = composer.output === "text" && conversation.length > 0;
  $("context").hidden = !goesOn;
  const count = conversation.length;
  $("context-text").textContent = `Continues the conversation (${count} ${count === 1 ? "answer" : "answers"} so far).`;
}

const nearEnd = () => window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 120;
const toEnd = () => window.scrollTo({ top: document.documentElement.scrollHeight });

async function send(request) {
  const asked = { ...request, history: request.output === "text" ? history() : [] };
  const turn = new Turn(asked, model, {
    announce,
    edit: (image) => composer.edit(image),
    reuse: (old) => {
      composer.fill(old);
      composer.focus();
    },
    seed: (seed) => composer.setSeed(seed),
    retry: (old) => {
      if (running) return;
      old.element.remove();
      turns = turns.filter((other) => other !== old);
      send(request);
    },
  });
  turns.push(turn);
  $("turns").append(turn.element);
  $("welcome").hidden = true;
  $("new").hidden = false;
  const controller = new AbortController();
  running = { turn, controller };
  composer.setBusy(true);
  if (matchMedia("(pointer: coarse)").matches) composer.prompt.blur(); // the keyboard would cover the result
  else composer.focus();
  announce("Sent.");
  toEnd();
  let follow = true;
  try {
    for await (const chunk of complete(toBody(asked, model), controller.signal)) {
      follow = nearEnd();
      turn.take(chunk);
      if (follow) toEnd();
    }
    follow = nearEnd();
    turn.finish();
  } catch (error) {
    if (error.name === "AbortError") turn.stop();
    else {
      turn.fail(error);
      if (error.status === 401) askForKey();
      else if (error.status === null) connect();
    }
  }
  if (running?.turn === turn) running = null;
  if (asked.output === "text" && turn.reply && turns.includes(turn)) conversation.push(turn);
  composer.setBusy(running !== null);
  if (follow) toEnd();
}

function stop() {
  running?.controller.abort();
  composer.focus();
}

const composer = new Composer({ announce, changed: () => queueMicrotask(showContext), send, stop });

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (running) stop();
  else if (composer.closeSettings()) composer.focus();
});

$("forget").onclick = () => {
  conversation = [];
  showContext();
  composer.focus();
};

$("new").onclick = () => {
  stop();
  turns = [];
  conversation = [];
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  $("new").hidden = true;
  showContext();
  composer.focus();
};

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  setApiKey($("key").value.trim());
  $("key").value = "";
  composer.focus();
  connect();
};

connect();
