// The page of `pi05 play`: shows the states that the server sends, and sends what is to be done.

const COLOURS = ["#0a84c6", "#e08a00", "#0a9e74", "#c9609d", "#7a6ff0", "#d55e00", "#8c7a1e", "#7d8590"];
const HISTORY = 16;  // executed actions that are drawn
const ARROWS = { left: "← left", right: "right →", away: "↑ away", near: "↓ nearer", up: "⤒ up", down: "⤓ down" };
const SPEEDS = { 0: "max", 0.25: "¼×", 0.5: "½×" };
const one = (selector, within = document) => within.querySelector(selector);

let socket = null;
let scene = null;
let state = null;
const notices = { unshown: "", wrong: "" };  // why there is no newer state, and what is wrong with the last command
let over = false;  // whether no robot has a next action
let held = false;  // whether the number is being chosen, and not to be overwritten

// --- the server

function connect() {
  socket = new WebSocket(`ws://${location.host}/play`);
  socket.onopen = () => { link("connected"); notice("wrong", ""); };
  socket.onmessage = event => {
    const said = JSON.parse(event.data);
    if (said.scene) begin(said.scene);
    else if (said.state) {
      notice("unshown", "");
      show(said.state);
    } else if (said.unshown) notice("unshown", said.unshown);
    else if (said.error) notice("wrong", said.error);
  };
  socket.onclose = event => {
    link(event.reason || "not connected: is pi05 play running?");
    setTimeout(connect, event.code === 1013 ? 5000 : 1000);
  };
}

function send(what, details = {}) {
  notice("wrong", "");
  if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ do: what, ...details }));
  else notice("wrong", "not connected: that was not sent");
}

function link(text) {
  one("#link").textContent = text;
  document.body.classList.toggle("connected", text === "connected");
}

function notice(of, text) {
  if (notices[of] === text) return;  // else every state would be read out to the blind
  notices[of] = text;
  const all = Object.values(notices).filter(Boolean).join("; ");
  one("#notice").textContent = all;
  one("#notice").hidden = !all;
}

// --- what stays the same

function begin(told) {
  scene = told;
  one("#players").replaceChildren();  // of an earlier server
  one("#simulator").textContent = told.simulator;
  one("#known").replaceChildren(...Object.entries(told.tasks).map(([task, sentence]) =>
    button(sentence ?? task, () => sentence ? tell(sentence, task) : reset(task, true))));
  one("#task").replaceChildren(...Object.keys(told.tasks).map(task => new Option(task, task)));
  one("#number").max = told.states - 1;
  for (const old of document.querySelectorAll("#speeds button")) old.remove();
  one("#speeds").append(...told.speeds.map(speed => {
    const made = button(SPEEDS[speed] ?? `${speed}×`, () => send("set_speed", { value: speed }));
    made.dataset.speed = speed;
    return made;
  }));
  one("#push").hidden = !told.ways.length;
  one("#ways").replaceChildren(...told.ways.map(way => {
    const made = button(ARROWS[way] ?? way, () => send("push", { way }));
    made.style.gridArea = way;
    return made;
  }));
}

function button(text, onclick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.onclick = onclick;
  return made;
}

function tell(text, task) {
  held = false;
  one("#instruction").value = text;
  send("tell", { text, stay: one("#stay").checked, task });
}

// --- what changes

function show(now) {
  state = now;
  over = now.players.every(player => player.outcome);
  one("#pause").textContent = over ? "Again" : now.paused ? "Play" : "Pause";
  one("#step").disabled = over;
  for (const made of document.querySelectorAll("#speeds button"))
    made.setAttribute("aria-pressed", Number(made.dataset.speed) === now.speed);
  if (now.players.length) {
    one("#task").value = now.players[0].judged;
    if (!held) one("#number").value = now.players[0].number;
  }
  const cards = one("#players");
  while (cards.children.length < now.players.length) cards.append(one("#player").content.cloneNode(true));
  now.players.forEach((player, place) => showPlayer(cards.children[place], player, now.paused));
}

function showPlayer(card, player, paused) {
  const write = (name, text) => { one(`.${name}`, card).textContent = text; };
  write("name", player.name);
  write("told", player.told);
  write("subtask", player.subtask ?? "");
  write("judged", player.judged);
  write("time", `${player.seconds.toFixed(1)} of ${player.max_seconds.toFixed(1)} s`);
  write("policy", milliseconds(player.milliseconds.policy, "a decision"));
  write("simulator", milliseconds(player.milliseconds.simulator, "an action"));
  write("rate", player.rate === null ? "–" : `${player.rate.toFixed(2)} × real time`);
  write("badge", player.outcome || (paused ? "paused" : "acting"));
  one(".badge", card).className = `badge ${player.success ? "success" : player.outcome ? "failed" : ""}`;
  one(".picture", card).src = player.picture;
  showSeen(one(".seen", card), player.images);
  showChunk(card, player);
  showAnswers(one(".answers", card), player.answers);
}

function milliseconds(value, of) {
  return value === null ? "–" : `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms ${of}`;
}

function showSeen(place, images) {
  for (const [camera, source] of Object.entries(images)) {
    let figure = place.querySelector(`[data-camera="${CSS.escape(camera)}"]`);
    if (!figure) {
      figure = document.createElement("figure");
      figure.dataset.camera = camera;
      figure.append(new Image(), document.createElement("figcaption"));
      figure.lastChild.textContent = camera;
      figure.firstChild.alt = `what the policy sees: ${camera}`;
      place.append(figure);
    }
    figure.firstChild.src = source;
  }
}

// The executed actions up to now, and from there on what is left of the chunk; shaded is what is executed of it.
function showChunk(card, player) {
  const { executed, chunk, place, due, low, high } = player;
  const dims = low.length;
  const planned = chunk ? chunk.slice(place) : [];  // begins with the action that was executed last
  const ahead = Math.max(1, (chunk ? chunk.length : 1) - 1);
  const x = step => 640 * (step + HISTORY) / (HISTORY + ahead);
  const all = [...executed, ...planned];
  const range = dim => {
    if (low[dim] !== null && high[dim] !== null) return [low[dim], high[dim]];
    const values = all.map(action => action[dim]);
    return [Math.min(...values), Math.max(...values)];
  };
  const parts = [];
  if (chunk && due) parts.push(shape("rect", { class: "due", x: x(0), y: 0, width: x(due) - x(0), height: 170 }));
  parts.push(shape("line", { class: "now", x1: x(0), x2: x(0), y1: 0, y2: 170 }));
  for (let dim = 0; dim < Math.min(dims, COLOURS.length); dim++) {
    const [least, most] = range(dim);
    const y = action => 8 + 154 * (1 - (action[dim] - least) / Math.max(most - least, 1e-6));
    const curve = (kind, actions, first) => actions.length && parts.push(shape("polyline", {
      class: kind, stroke: COLOURS[dim], points: actions.map((action, i) => `${x(first + i)},${y(action)}`).join(" "),
    }));
    curve("executed", executed, 1 - executed.length);
    curve("planned", planned, 0);
  }
  one(".chunk", card).replaceChildren(...parts);
  const legend = one(".curves figcaption", card);
  if (legend.children.length === 0) {
    for (let dim = 0; dim < Math.min(dims, COLOURS.length); dim++) {
      const name = document.createElement("span");
      const mark = document.createElement("i");
      mark.style.background = COLOURS[dim];
      name.append(mark, `action ${dim}`);
      legend.append(name);
    }
    if (dims > COLOURS.length) legend.append(`the first ${COLOURS.length} of ${dims}; `);
    legend.append("solid: executed, dashed: the rest of the chunk, shaded: due before the next one");
  }
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function showAnswers(place, answers) {
  const key = JSON.stringify(answers.map(answer => [
    answer.asked, answer.camera, answer.text, answer.boxes, answer.picture.length,
  ]));
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  const asked = document.createElement("p");
  asked.textContent = answers[0]?.asked ?? "";
  place.replaceChildren(...answers.length ? [asked] : [], ...answers.map(answer => {
    const figure = document.createElement("figure");
    const shown = document.createElement("div");
    shown.className = "shown";
    const image = new Image();
    image.src = answer.picture;
    image.alt = `${answer.camera} as it was asked about`;
    shown.append(image, ...answer.boxes.map(([top, left, bottom, right]) => {
      const box = document.createElement("div");
      box.className = "box";
      const percent = value => `${100 * value}%`;
      Object.assign(box.style, {
        left: percent(Math.min(left, right)), top: percent(Math.min(top, bottom)),
        width: percent(Math.abs(right - left)), height: percent(Math.abs(bottom - top)),
      });
      return box;
    }));
    const caption = document.createElement("figcaption");
    const said = document.createElement("strong");
    said.textContent = answer.text || (answer.boxes.length ? "" : "(it says nothing)");
    caption.append(said, answer.camera);
    figure.append(shown, caption);
    return figure;
  }));
}

// --- what is typed and clicked

one("#tell").onsubmit = event => { event.preventDefault(); tell(one("#instruction").value); };
one("#ask").onsubmit = event => { event.preventDefault(); send("ask", { text: one("#question").value }); };
one("#pause").onclick = () => {
  if (!state) return;
  if (!over) send("pause", { on: !state.paused });
  else if (reset()) send("pause", { on: false });
};
one("#step").onclick = () => send("step");
function reset(task = one("#task").value, anew = false) {  // returns whether the number can be begun at
  if (!one("#reset").reportValidity()) return false;
  held = false;
  send("reset", { number: one("#number").valueAsNumber, task, anew });
  return true;
}
one("#reset").onsubmit = event => { event.preventDefault(); reset(); };
one("#task").onchange = () => reset();
one("#number").oninput = () => { held = true; };
const pauses = event => event.code === "Space" && !event.target.closest("input, select, textarea");
document.onkeydown = event => {
  if (!pauses(event)) return;
  event.preventDefault();
  if (!event.repeat) one("#pause").click();
};
document.onkeyup = event => { if (pauses(event)) event.preventDefault(); };  // Firefox clicks the button in focus here

connect();
