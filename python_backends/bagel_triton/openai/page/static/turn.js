// One request and its reply on the page: progress, previews, reasoning, text, images, timings and code.

import { curl, pythonScript, task } from "./request.js";

const STAGES = { thinker: "Reading", dit: "Drawing", vae_decode: "Decoding" };

/** An element with properties and children; `class` and `aria-…` are attributes. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const seconds = (s) => (s < 10 ? `${s.toFixed(1)} s` : `${Math.round(s)} s`);

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Browsers give a page that came over plain HTTP from another host no clipboard.
  const area = el("textarea", { value: text, class: "visually-hidden" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** The reasoning and the text of one choice. */
class Answer {
  constructor() {
    this.text = document.createTextNode("");
    this.reasoning = document.createTextNode("");
    this.element = el("div", { class: "answer", hidden: true }, this.text);
    this.summary = el("summary", { textContent: "Thinking" });
    this.details = el("details", { class: "reasoning", open: true, hidden: true }, this.summary, el("div", {}, this.reasoning));
  }

  think(piece) {
    this.began ??= performance.now();
    this.details.hidden = false;
    this.reasoning.appendData(piece);
  }

  say(piece) {
    this.endReasoning();
    this.element.hidden = false;
    this.text.appendData(piece);
  }

  endReasoning() {
    if (this.began === undefined || this.reasonedFor !== undefined) return;
    this.reasonedFor = (performance.now() - this.began) / 1000;
    this.summary.textContent = `Thought for ${seconds(this.reasonedFor)}`;
    this.details.open = false;
  }
}

/** The place of one image: empty, then previews, then the image. */
class ResultImage {
  constructor(ratio) {
    this.image = el("img", { alt: "", hidden: true });
    this.frame = el("div", { class: "frame pending" }, this.image);
    this.frame.style.aspectRatio = ratio;
    this.caption = el("figcaption");
    this.element = el("figure", {}, this.frame, this.caption);
  }

  preview(url) {
    this.image.src = url;
    this.image.hidden = false;
    this.frame.classList.add("preview");
  }

  show(url, alt) {
    this.url = url;
    this.image.src = url;
    this.image.alt = alt;
    this.image.hidden = false;
    this.frame.classList.remove("pending", "preview");
    this.frame.style.aspectRatio = "";
  }
}

export class Turn {
  /** `on` holds the page's handlers: edit, reuse, seed, retry, announce. */
  constructor(request, model, on) {
    this.request = request;
    this.model = model;
    this.on = on;
    this.answers = [];
    this.images = [];
    this.began = performance.now();
    this.announced = 0;

    const [name] = task(request);
    const thumbs = request.images.map(({ url, name: file }) => el("img", { src: url, alt: file, width: 56, height: 56 }));
    this.results = el("div", { class: "results" });
    this.bar = el("progress", { "aria-label": "Progress" });
    this.label = el("span", { textContent: "Waiting for the server" });
    this.clock = el("span", { class: "clock" });
    this.progress = el("div", { class: "progress" }, el("p", {}, this.label, this.clock), this.bar);
    this.foot = el("div", { class: "foot" });
    const heading = el("h2", { class: "asked", textContent: request.prompt });
    this.element = el("article", { class: "turn", "aria-label": `${name}: ${request.prompt}` },
      el("header", {}, el("p", { class: "kind", textContent: name }), heading,
        thumbs.length ? el("div", { class: "thumbs" }, ...thumbs) : null),
      ...(request.output === "image" ? [this.progress, this.results] : [this.results, this.progress]), this.foot);
    if (request.output === "image") {
      const ratio = this.#ratio();
      for (let index = 0; index < (request.settings.n ?? 1); index += 1) this.#imageAt(index, ratio);
    }
    this.timer = setInterval(() => { this.clock.textContent = seconds(this.elapsed); }, 200);
  }

  get elapsed() {
    return (performance.now() - this.began) / 1000;
  }

  /** The reply as a message of the conversation that follows; null where there is none. */
  get reply() {
    const text = this.answers[0]?.text.data;
    return text ? { role: "assistant", content: text } : null;
  }

  take(chunk) {
    if (chunk.progress) this.#advance(chunk.progress);
    if (chunk.partial_image) this.#imageAt(chunk.partial_image.index).preview(chunk.partial_image.url);
    for (const { delta, index, finish_reason: reason } of chunk.choices ?? []) {
      if (delta?.reasoning_content) {
        this.#answer(index).think(delta.reasoning_content);
        this.#status("Thinking");
      }
      const images = delta?.images ?? (Array.isArray(delta?.content) ? delta.content : []);
      for (const part of images) this.#draw(part);
      if (typeof delta?.content === "string" && delta.content) {
        this.#answer(index).say(delta.content);
        this.#status("Writing");
        this.bar.hidden = true;
      }
      if (reason === "length") this.#answer(index).cut = true;
    }
    if (chunk.metrics) this.metrics = chunk.metrics;
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.seed !== undefined) this.seed = chunk.seed;
  }

  finish() {
    this.#end();
    this.images.forEach((image, index) => this.#captionOf(image, index));
    for (const answer of this.answers) {
      if (answer.cut && answer.text.data) {
        answer.element.after(el("p", { class: "note", textContent: "The answer was cut at its longest length." }));
      }
    }
    this.#footer();
    const drawn = this.images.filter((image) => image.url).length;
    const answer = this.answers.map(({ text }) => text.data).join("\n");
    this.on.announce(drawn ? `${drawn === 1 ? "The image is" : `${drawn} images are`} ready.` : answer);
  }

  stop() {
    this.#end();
    this.results.append(el("p", { class: "note", textContent: "Stopped." }));
    this.#footer();
    this.on.announce("Stopped.");
  }

  fail(error) {
    this.#end();
    const title = error.status === null ? "No result" : `The server refused this (${error.status})`;
    const again = el("button", { type: "button", textContent: "Try again", onclick: () => this.on.retry(this) });
    this.results.append(el("div", { class: "failure", role: "alert" },
      el("strong", { textContent: error.status >= 500 ? `The server failed (${error.status})` : title }),
      el("p", { textContent: error.message }),
      error.requestId ? el("p", { class: "note", textContent: `Request ${error.requestId}` }) : null,
      el("div", { class: "actions" }, again, this.#reuse())));
  }

  #end() {
    clearInterval(this.timer);
    this.progress.remove();
    for (const answer of this.answers) answer.endReasoning();
    for (const image of this.images) if (!image.url) image.element.remove();
  }

  #ratio() {
    const { width, height } = this.request.settings;
    const input = this.request.images.at(-1);
    if (width || height) return `${width ?? height} / ${height ?? width}`;
    return input?.width ? `${input.width} / ${input.height}` : "1 / 1";
  }

  #imageAt(index, ratio = this.#ratio()) {
    if (!this.images[index]) {
      this.images[index] = new ResultImage(ratio);
      this.results.append(this.images[index].element);
    }
    return this.images[index];
  }

  #answer(index) {
    if (!this.answers[index]) {
      const answer = this.answers[index] = new Answer();
      const parts = [answer.details, answer.element];
      if (this.request.output === "image") this.results.prepend(...parts);
      else this.results.append(...parts);
    }
    return this.answers[index];
  }

  #draw(part) {
    const { url } = part.image_url;
    if (this.images.some((image) => image.url === url)) return;
    const empty = this.images.findIndex((image) => !image.url);
    const index = part.index ?? (empty < 0 ? this.images.length : empty);
    const image = this.#imageAt(index);
    image.seed = part.seed;
    image.show(url, `Result: ${this.request.prompt}`);
  }

  #status(text) {
    if (this.label.textContent !== text) this.label.textContent = text;
  }

  #advance({ stage, step, steps }) {
    if (!steps) {
      this.#status("Waiting for a turn");
      this.bar.removeAttribute("value");
      return;
    }
    for (const answer of this.answers) answer.endReasoning();
    this.bar.max = steps;
    this.bar.value = step;
    this.#status(`${STAGES[stage] ?? stage}, step ${step} of ${steps}`);
    const quarter = Math.floor((4 * step) / steps);
    if (quarter > this.announced && quarter < 4) {
      this.announced = quarter;
      this.on.announce(`Step ${step} of ${steps}`);
    }
  }

  #captionOf(shown, index) {
    if (!shown.url) return;
    const seed = shown.seed ?? (this.seed === undefined || this.seed === null ? null : this.seed + index);
    const name = `bagel-${seed ?? index + 1}.png`;
    const { image, url } = shown;
    const size = el("span");
    image.decode().then(() => {
      size.textContent = `${image.naturalWidth} × ${image.naturalHeight}`;
      shown.element.style.maxWidth = `${Math.max(image.naturalWidth, 512)}px`;
    }, () => {});
    const edit = () => this.on.edit({ name, url, width: image.naturalWidth, height: image.naturalHeight });
    shown.caption.replaceChildren(
      el("span", { class: "facts" }, size,
        seed === null ? null : el("button", {
          type: "button", class: "link", textContent: `seed ${seed}`, title: "Use this seed again",
          onclick: () => this.on.seed(seed),
        })),
      el("span", { class: "actions" },
        el("button", { type: "button", textContent: "Edit this result", onclick: edit }),
        el("a", { class: "button", href: url, download: name, textContent: "Download" })));
  }

  #reuse() {
    return el("button", { type: "button", textContent: "Reuse prompt", onclick: () => this.on.reuse(this.request) });
  }

  #footer() {
    const facts = [seconds(this.metrics?.total_s ?? this.elapsed)];
    if (this.request.output === "text") {
      if (this.usage) facts.push(`${this.usage.completion_tokens} tokens`);
      if (typeof this.seed === "number") facts.push(`seed ${this.seed}`);
    }
    const panel = el("div", { class: "panel", hidden: true });
    const buttons = [
      ["Timings", this.metrics ? () => this.#timings() : null],
      ["curl", () => this.#code(curl(this.request, this.model))],
      ["Python", () => this.#code(pythonScript(this.request, this.model))],
    ].filter(([, build]) => build).map(([name, build]) => {
      const button = el("button", { type: "button", textContent: name, "aria-expanded": "false" });
      button.onclick = () => {
        const opens = button.getAttribute("aria-expanded") === "false";
        for (const other of buttons) other.setAttribute("aria-expanded", String(opens && other === button));
        panel.hidden = !opens;
        panel.replaceChildren(...(opens ? [build()] : []));
        panel.scrollIntoView({ block: "nearest" });
      };
      return button;
    });
    this.foot.append(
      el("div", { class: "facts" }, ...facts.map((fact) => el("span", { textContent: fact }))),
      el("div", { class: "actions" }, ...buttons, this.#reuse()), panel);
  }

  #timings() {
    const rows = Object.entries(this.metrics.stages).map(([stage, { queue_s: queue, run_s: run }]) =>
      el("tr", {}, el("th", { scope: "row", textContent: stage }),
        ...[queue, run].map((value) => el("td", { textContent: `${value.toFixed(3)} s` }))));
    const head = ["Stage", "Waiting", "Working"].map((text) => el("th", { scope: "col", textContent: text }));
    return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
  }

  #code(text) {
    const button = el("button", { type: "button", class: "copy", textContent: "Copy" });
    button.onclick = async () => {
      await copy(text);
      button.textContent = "Copied";
      this.on.announce("Copied.");
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    };
    return el("div", { class: "code" }, button, el("pre", { tabIndex: 0 }, el("code", { textContent: text })));
  }
}
