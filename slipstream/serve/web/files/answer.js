// One answer on the page, and as the message that goes back with the next question.

import { TokenTrack, tokenElement } from "./tokens.js";

export class Answer {
  #track = new TokenTrack();
  #content = "";
  #reasoning = "";
  #calls = []; // {call, shown}
  #text = element("div", "text");
  #thoughts = null; // {details, text}, once there is reasoning
  #footer = element("p", "footer soft");
  #started = performance.now();
  #firstToken = null;
  #finishReason = null;
  #usage = null;
  #say;

  /** say: called with each piece of text, for those who hear it, and with null at the end. */
  constructor(say) {
    this.#say = say;
    this.element = element("article", "answer");
    this.#text.role = "group";
    this.#text.ariaLabel = "Answer";
    this.element.append(this.#text, this.#footer);
  }

  /** chunk: of a streamed chat. */
  push({ choices: [choice], usage }) {
    this.#usage = usage ?? this.#usage;
    if (choice === undefined) return;
    this.#firstToken ??= performance.now();
    this.#finishReason = choice.finish_reason;
    this.#track.push(choice.logprobs?.content ?? [], { isLast: choice.finish_reason !== null });
    const { content = "", reasoning_content: reasoning = "", tool_calls: calls = [] } = choice.delta;
    if (reasoning) this.#think(reasoning);
    if (content) this.#write(content);
    for (const call of calls) this.#call(call);
  }

  /** why: it ended before its time, in words, or null. */
  end(why) {
    this.#say(null);
    if (this.#thoughts !== null && this.#content) this.#thoughts.details.open = false;
    this.#footer.textContent = [why, ...this.#measures()].filter(Boolean).join(" · ");
  }

  get isEmpty() {
    return !this.#content && !this.#reasoning && this.#calls.length === 0;
  }

  get toolCalls() {
    return this.#calls.map(({ call }) => call);
  }

  get message() {
    const message = { role: "assistant", content: this.#content };
    if (this.#reasoning) message.reasoning_content = this.#reasoning;
    if (this.#calls.length > 0) message.tool_calls = this.toolCalls;
    return message;
  }

  #write(text) {
    if (this.#thoughts !== null && !this.#content) this.#thoughts.details.open = false;
    this.#content += text;
    this.#append(this.#text, text);
    this.#say(text);
  }

  #think(text) {
    if (this.#thoughts === null) {
      const details = element("details", "reasoning");
      const summary = element("summary");
      summary.textContent = "Reasoning";
      this.#thoughts = { details, text: element("div", "text") };
      details.open = true;
      details.append(summary, this.#thoughts.text);
      this.element.prepend(details);
    }
    this.#reasoning += text;
    this.#append(this.#thoughts.text, text);
  }

  #call({ index, id, function: { name, arguments: given = "" } }) {
    if (id !== undefined) {
      const shown = element("pre", "call");
      this.#calls[index] = { call: { id, type: "function", function: { name, arguments: "" } }, shown };
      this.#footer.before(shown);
    }
    const { call, shown } = this.#calls[index];
    call.function.arguments += given;
    shown.textContent = `${call.function.name}(${call.function.arguments})`;
  }

  #append(place, text) {
    for (const piece of this.#track.take(text)) {
      place.append(piece.tokens.length > 0 ? tokenElement(piece) : piece.text);
    }
    const first = place.querySelector(".token");
    if (first !== null && place.querySelector(".token[tabindex='0']") === null) first.tabIndex = 0;
  }

  #measures() {
    if (this.#usage === null) return [];
    const { completion_tokens: count } = this.#usage;
    const wait = (this.#firstToken - this.#started) / 1000;
    const rate = (count - 1) / ((performance.now() - this.#firstToken) / 1000);
    return [
      this.#finishReason === "length" ? "ended by its limit" : null,
      `${count} ${count === 1 ? "token" : "tokens"}`,
      `first after ${wait.toFixed(2)} s`,
      count > 1 ? `${rate.toFixed(0)} tokens/s` : null,
    ];
  }
}

export function element(name, className = "") {
  const made = document.createElement(name);
  made.className = className;
  return made;
}
