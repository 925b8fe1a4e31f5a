// Where the page begins.

import { startChat } from "./chat.js";
import { watchEngine } from "./engine.js";

const isWide = matchMedia("(min-width: 60rem)").matches;
for (const panel of document.querySelectorAll("details.panel")) panel.open = isWide;
startChat();
watchEngine();
