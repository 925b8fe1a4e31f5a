// Tokens of an answer: which part of its text each is, and what else it might have been.

/** The tokens of one answer, as they come. */
export class TokenTrack {
  #text = "";
  #pieces = []; // {start, end, tokens} of the text
  #unfinished = []; // tokens that ended inside a character
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #cursor = 0;
  #piece = 0;

  /** entries: of choices[].logprobs.content. They come no later than the text that is made of them. */
  push(entries, { isLast }) {
    for (const entry of entries) {
      this.#unfinished.push(entry);
      this.#grow(this.#decoder.decode(new Uint8Array(entry.bytes), { stream: true }));
    }
    if (isLast) this.#grow(this.#decoder.decode()); // a character that was never finished
  }

  /** What comes next of the answer, cut into {text, tokens}. Between two such texts there may be markers. */
  take(text) {
    const start = this.#text.indexOf(text, this.#cursor);
    if (start < 0) return [{ text, tokens: [] }];
    const end = (this.#cursor = start + text.length);
    while (this.#pieces[this.#piece].end <= start) this.#piece++;
    const taken = [];
    for (let index = this.#piece; index < this.#pieces.length && this.#pieces[index].start < end; index++) {
      const piece = this.#pieces[index];
      const part = this.#text.slice(Math.max(start, piece.start), Math.min(end, piece.end));
      taken.push({ text: part, tokens: piece.tokens });
    }
    return taken;
  }

  #grow(text) {
    if (text === "") return;
    const start = this.#text.length;
    this.#text += text;
    this.#pieces.push({ start, end: this.#text.length, tokens: this.#unfinished });
    this.#unfinished = [];
  }
}

const tokensOf = new WeakMap(); // by element

/** A span of the text, with the tokens that it is made of. */
export function tokenElement({ text, tokens }) {
  const span = document.createElement("span");
  span.className = "token";
  span.classList.toggle("unsure", tokens.some((token) => Math.exp(token.logprob) < 0.5));
  span.tabIndex = -1;
  span.textContent = text;
  tokensOf.set(span, tokens);
  return span;
}

/** Show what is known of a token where one is pointed at or in focus; arrow keys go from one to the next. */
export function showTokensOf(conversation, tooltip) {
  let shown = null;
  const show = (element) => {
    hide();
    shown = element;
    tooltip.replaceChildren(...tokensOf.get(element).map(alternatives));
    tooltip.hidden = false;
    element.setAttribute("aria-describedby", tooltip.id);
    place(tooltip, firstLine(element));
  };
  const hide = () => {
    tooltip.hidden = true;
    shown?.removeAttribute("aria-describedby");
    shown = null;
  };
  const follow = () => {
    if (shown === null) return;
    const { top, bottom } = conversation.getBoundingClientRect();
    const line = firstLine(shown);
    if (line.bottom < top || line.top > bottom) hide();
    else place(tooltip, line);
  };
  for (const [coming, leaving] of [
    ["pointerover", "pointerout"],
    ["focusin", "focusout"],
  ]) {
    conversation.addEventListener(coming, ({ target }) => target.classList.contains("token") && show(target));
    conversation.addEventListener(leaving, hide);
  }
  conversation.addEventListener("scroll", follow); // that of a token brought into view by its focus comes after it
  conversation.addEventListener("keydown", (event) => {
    const next = neighbour(event);
    if (next === undefined) return;
    event.preventDefault();
    event.target.tabIndex = -1; // one stop of the Tab key for a whole text
    next.tabIndex = 0;
    next.focus();
  });
  document.addEventListener("keydown", ({ key }) => key === "Escape" && hide());
}

function neighbour({ target, key, ctrlKey, metaKey, altKey }) {
  if (!target.classList.contains("token") || ctrlKey || metaKey || altKey) return undefined;
  const all = [...target.parentElement.querySelectorAll(".token")];
  const here = all.indexOf(target);
  return { ArrowRight: all[here + 1], ArrowLeft: all[here - 1], Home: all[0], End: all.at(-1) }[key];
}

function alternatives(token) {
  const table = document.createElement("table");
  const isTop = token.top_logprobs.some((each) => sameToken(each, token));
  for (const each of isTop ? token.top_logprobs : [...token.top_logprobs, token]) {
    const row = table.insertRow();
    const isChosen = sameToken(each, token);
    row.classList.toggle("chosen", isChosen);
    row.insertCell().textContent = visible(each.token);
    const bar = document.createElement("div");
    bar.style.width = `${100 * Math.exp(each.logprob)}%`;
    row.insertCell().append(bar);
    row.insertCell().textContent = percent(Math.exp(each.logprob));
    row.insertCell().textContent = isChosen ? "chosen" : "";
  }
  return table;
}

function sameToken(one, other) {
  return one.logprob === other.logprob && one.bytes.join() === other.bytes.join();
}

function percent(part) {
  return part < 0.0005 ? "< 0.1 %" : `${(100 * part).toFixed(1)} %`;
}

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "(nothing)";
}

function firstLine(element) {
  return element.getClientRects()[0] ?? element.getBoundingClientRect();
}

/** Below the token or, where that has no room, above it. */
function place(tooltip, { left, top, bottom }) {
  const gap = 6;
  const { width, height } = tooltip.getBoundingClientRect();
  const isAbove = bottom + gap + height > innerHeight && top - gap - height >= 0;
  tooltip.style.left = `${Math.max(gap, Math.min(left, innerWidth - width - gap))}px`;
  tooltip.style.top = `${isAbove ? top - gap - height : bottom + gap}px`;
}
