// The form: the prompt, images by button, drop or paste, the kind of output, and the settings.

import { el } from "./turn.js";
import { task } from "./request.js";

const MAX_IMAGES = 10;
const $ = (id) => document.getElementById(id);

const PLACEHOLDERS = {
  "Text to image": "Describe the image you want",
  "Edit an image": "Say what to change",
  "Describe an image": "Ask about the image",
  "Chat": "Ask anything",
};

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function measured(name, url) {
  const image = el("img", { src: url });
  await image.decode().catch(() => {}); // the server may know formats that this browser does not
  return { name, url, width: image.naturalWidth, height: image.naturalHeight };
}

/** The sample image as a PNG: the server takes no SVG. */
async function sample() {
  const image = el("img", { src: "page/sample.svg" });
  await image.decode();
  const canvas = el("canvas", { width: 512, height: 512 });
  canvas.getContext("2d").drawImage(image, 0, 0, 512, 512);
  return { name: "sample.png", url: canvas.toDataURL("image/png"), width: 512, height: 512 };
}

export class Composer {
  #images = [];
  #pasted = 0;

  /** `on` has `send(request)`, `stop()`, `announce(text)` and `changed()`. */
  constructor(on) {
    this.on = on;
    this.form = $("composer");
    this.prompt = $("prompt");
    this.busy = false;
    this.form.onsubmit = (event) => {
      event.preventDefault();
      if (this.busy) on.stop();
      else this.submit();
    };
    this.prompt.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.busy) this.submit();
    };
    this.prompt.oninput = () => this.#fit();
    for (const radio of this.form.elements.output) radio.onchange = () => this.#show();
    $("files").onchange = ({ target }) => {
      this.addFiles([...target.files]);
      target.value = "";
    };
    $("settings-button").onclick = () => this.#openSettings($("settings").hidden);
    this.#acceptDrops();
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length) return;
      event.preventDefault();
      this.addFiles(files);
    });
    for (const button of document.querySelectorAll("#examples button")) {
      button.onclick = () => this.#example(button.dataset);
    }
    this.#show();
  }

  get output() {
    return this.form.elements.output.value;
  }

  /** Where the settings are open, close them; whether they were. */
  closeSettings() {
    const open = !$("settings").hidden;
    if (open) this.#openSettings(false);
    return open;
  }

  submit() {
    const prompt = this.prompt.value.trim();
    if (!prompt) {
      this.focus();
      this.#complain(this.#images.length ? "Write what to do with the image." : "Write a prompt first.");
      return;
    }
    const wrong = [...this.#fields()].find((field) => field.validity.badInput || Math.abs(field.value) > Number.MAX_SAFE_INTEGER);
    if (wrong) {
      this.#openSettings(true);
      wrong.focus();
      const name = wrong.labels[0].textContent;
      this.#complain(wrong.validity.badInput ? `${name} is not a number.` : `${name} is larger than this page can send.`);
      return;
    }
    this.#complain("");
    this.#openSettings(false);
    const request = {
      output: this.output,
      prompt,
      images: this.#images,
      think: $("think").checked,
      settings: this.#settings(),
    };
    this.fill({ ...request, prompt: "", images: [] });
    this.on.send(request);
  }

  /** Put `request` back into the form. */
  fill({ output, prompt, images, think, settings }) {
    this.form.elements.output.value = output;
    this.prompt.value = prompt;
    this.#images = [...images];
    $("think").checked = think;
    for (const field of this.#fields()) field.value = settings[field.name] ?? "";
    this.#show();
    this.#fit();
  }

  focus() {
    this.prompt.focus();
  }

  setSeed(seed) {
    this.form.elements.seed.value = seed;
    this.#openSettings(true);
    this.form.elements.seed.focus();
  }

  /** Start an edit of `image`, a result. */
  edit(image) {
    this.form.elements.output.value = "image";
    this.#images = [image];
    this.#show();
    this.focus();
    this.on.announce("The result is the input image of the next request.");
  }

  setBusy(busy) {
    this.busy = busy;
    this.#show();
  }

  async addFiles(files) {
    const others = files.filter((file) => !file.type.startsWith("image/"));
    const images = files.filter((file) => file.type.startsWith("image/"));
    const room = MAX_IMAGES - this.#images.length;
    const names = images.map((file) => (file.name && file.name !== "image.png" ? file.name : `image-${(this.#pasted += 1)}.png`));
    const added = await Promise.all(images.slice(0, room).map(async (file, index) => measured(names[index], await read(file))));
    this.#images.push(...added);
    this.#complain(
      others.length ? `${others[0].name} is not an image.`
        : images.length > room ? `A request takes at most ${MAX_IMAGES} images.` : "",
    );
    const count = this.#images.length;
    if (added.length) this.on.announce(count === 1 ? "One image in the request." : `${count} images in the request.`);
    this.#show();
    this.focus();
  }

  #fields() {
    return $("settings").querySelectorAll("input");
  }

  #settings() {
    const given = [...this.#fields()].filter((field) => field.value.trim() !== "");
    return Object.fromEntries(given.map((field) => [field.name, field.type === "number" ? Number(field.value) : field.value]));
  }

  async #example({ output, prompt, sample: wanted, think }) {
    const images = wanted === undefined ? [] : [await sample()];
    this.fill({ output, prompt, images, think: think !== undefined, settings: this.#settings() });
    this.focus();
    this.on.announce("The example is filled in. Press Enter to send it.");
  }

  #openSettings(open) {
    $("settings").hidden = !open;
    $("settings-button").setAttribute("aria-expanded", String(open));
  }

  #complain(text) {
    $("complaint").textContent = text;
    $("complaint").hidden = !text;
  }

  #fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight}px`;
  }

  #acceptDrops() {
    const overlay = $("drop");
    let depth = 0; // dragenter and dragleave come for every element on the way
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    const show = (change) => {
      depth = Math.max(0, depth + change);
      overlay.hidden = !depth;
    };
    window.addEventListener("dragenter", (event) => holdsFiles(event) && show(1));
    window.addEventListener("dragleave", (event) => holdsFiles(event) && show(-1));
    window.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
    window.addEventListener("drop", (event) => {
      if (!holdsFiles(event)) return;
      event.preventDefault();
      show(-depth);
      this.addFiles([...event.dataTransfer.files]);
    });
  }

  #show() {
    const [name, verb] = task({ output: this.output, images: this.#images });
    this.prompt.placeholder = PLACEHOLDERS[name];
    $("send").textContent = this.busy ? "Stop" : verb;
    $("send").classList.toggle("stop", this.busy);
    this.form.dataset.output = this.output;
    this.form.dataset.images = this.#images.length ? "some" : "none";
    const side = this.#images.length ? "as the input" : "auto";
    for (const field of ["width", "height"]) this.form.elements[field].placeholder = side;
    const list = $("attachments");
    list.hidden = !this.#images.length;
    list.replaceChildren(...this.#images.map((image, index) => el("li", {},
      el("img", { src: image.url, alt: image.name, width: 64, height: 64 }),
      el("button", {
        type: "button", textContent: "×", "aria-label": `Remove ${image.name}`,
        onclick: () => {
          this.#images.splice(index, 1);
          this.#show();
          this.focus();
        },
      }))));
    this.on.changed();
  }
}
