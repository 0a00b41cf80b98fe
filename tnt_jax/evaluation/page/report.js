"use strict";
// Charts, lists and filters of the report. Texts of models only ever become text nodes.

const byId = (id) => document.getElementById(id);
const island = (id) => JSON.parse(byId(id).textContent);
const data = island("data");

/** An element with attributes and children; a child that is a string becomes a text node. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function fill(select, values, labels = values) {
  const before = select.value;
  select.replaceChildren(
    ...values.map((value, i) => element("option", { value }, labels[i])),
  );
  if (values.includes(before)) select.value = before;
  select.disabled = values.length < 2;
}

const distinct = (values) => [...new Set(values)];
const percent = (share) => `${(100 * share).toFixed(0)} %`;

// --- What is shown --------------------------------------------------------------------------------

const chosen = {};

/** Reads the three selects, each offering what there is under the ones before it. */
function choose() {
  fill(byId("task"), distinct(data.rows.map((row) => row.task)));
  chosen.task = byId("task").value;
  const ofTask = data.rows.filter((row) => row.task === chosen.task);
  fill(byId("decoder"), distinct(ofTask.map((row) => row.decoder)));
  chosen.decoder = byId("decoder").value;
  const isChosen = (row) => row.task === chosen.task && row.decoder === chosen.decoder;
  fill(byId("arm"), data.comparisons.filter(isChosen).map((comparison) => comparison.arm));
  chosen.arm = byId("arm").value;
  chosen.number = data.comparisons.findIndex((row) => isChosen(row) && row.arm === chosen.arm);
  chosen.rows = data.rows.filter(isChosen);
  chosen.groups = data.groups.filter(isChosen);
  for (const shown of document.querySelectorAll("[data-task]")) {
    const { task, decoder, arm } = shown.dataset;
    shown.hidden = task !== chosen.task || decoder !== chosen.decoder || (arm !== undefined && arm !== chosen.arm);
  }
  for (const shown of document.querySelectorAll("[data-comparison]")) {
    shown.hidden = Number(shown.dataset.comparison) !== chosen.number;
  }
}

// --- Charts ---------------------------------------------------------------------------------------

const MARKERS = ["circle", "square", "triangle", "diamond", "inverted_triangle", "star", "hex", "triangle_pin", "square_pin"];
const PERCENTAGES = ["cut", "unwanted_rate_after", "same_as_mask", "exact_match", "unchanged_clean", "repeated_word_rate", "repeated_phrase_rate", "unknown_token_rate", "distinct_ratio", "distinct_trigram_ratio", "unrelated_unchanged"];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const series = () => color("--series").split(" ");
let views = [];

/** A figure in the colours of the page. */
function figure(settings) {
  const plot = Bokeh.Plotting.figure({
    sizing_mode: "stretch_width",
    height: 380,
    tools: "pan,box_zoom,reset",
    toolbar_location: "above",
    background_fill_color: color("--ground"),
    border_fill_color: color("--ground"),
    outline_line_color: color("--line"),
    min_border_right: 20,
    ...settings,
  });
  plot.toolbar.logo = null;
  for (const axis of [...plot.xaxes, ...plot.yaxes]) {
    axis.axis_label_text_font_style = "normal";
    axis.axis_label_text_color = axis.major_label_text_color = color("--text");
    axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = color("--quiet");
  }
  for (const grid of [...plot.xgrids, ...plot.ygrids]) grid.grid_line_color = color("--line");
  return plot;
}

/** Places the legend, which is there only once something has a label. */
function finishLegend(plot) {
  const legend = plot.legend;
  legend.background_fill_color = legend.inactive_fill_color = color("--ground");
  legend.label_text_color = color("--text");
  legend.border_line_color = color("--line");
  legend.click_policy = "hide";
  legend.location = "left";
  legend.orientation = "horizontal";
  legend.ncols = 4;
  plot.add_layout(legend, "below");
}

async function draw(plot, place) {
  place.replaceChildren();
  views.push(await Bokeh.Plotting.show(plot, place));
}

/** Shows what the column `told` of a source says, [[heading, value], ...], at the pointer. */
function hover() {
  const tooltips = (source, { index }) => {
    const lines = source.data.told[index].map(([heading, value]) =>
      element("tr", {}, element("th", { scope: "row", style: "text-align: left" }, heading), element("td", {}, value)));
    return element("table", {}, ...lines);
  };
  return new Bokeh.HoverTool({ tooltips, point_policy: "snap_to_data" });
}

function tellRow(row) {
  const known = data.columns.filter(([, field]) => field in row.shown);
  return [["objective", row.objective], ...known.map(([heading, field]) => [heading, row.shown[field]])];
}

const labelOf = (select) => select.selectedOptions[0].textContent;

function tradeOff() {
  const [x, y] = [byId("x").value, byId("y").value];
  const rows = chosen.rows.filter((row) => row[x] !== null && row[y] !== null);
  const plot = figure({ x_axis_label: labelOf(byId("x")), y_axis_label: labelOf(byId("y")) });
  for (const [axis, name] of [[plot.xaxis, x], [plot.yaxis, y]]) {
    if (PERCENTAGES.includes(name)) axis.formatter = new Bokeh.NumeralTickFormatter({ format: "0.[0] %" });
  }
  // Around points that all lie at one place.
  for (const [range, name] of [[plot.x_range, x], [plot.y_range, y]]) {
    range.default_span = ["bleu", "rouge_l"].includes(name) ? 10 : 0.1;
  }
  const names = distinct(data.rows.map((row) => row.objective));
  for (const name of names) {
    const own = rows.filter((row) => row.objective === name);
    if (!own.length) continue;
    const number = names.indexOf(name);
    const palette = series();
    const columns = { x: own.map((row) => row[x]), y: own.map((row) => row[y]), told: own.map(tellRow) };
    plot.scatter({ field: "x" }, { field: "y" }, {
      source: new Bokeh.ColumnDataSource({ data: columns }),
      marker: MARKERS[number % MARKERS.length],
      size: 13,
      fill_color: palette[number % palette.length],
      line_color: color("--text"),
      fill_alpha: 0.85,
      legend_label: name,
    });
  }
  if (rows.length) {
    finishLegend(plot);
    plot.add_tools(hover());
  }
  points(rows);
  return draw(plot, byId("trade-off-chart"));
}

/** The same points as a table. */
function points(rows) {
  const columns = data.columns.filter(([, field]) => rows.some((row) => field in row.shown));
  const head = element("tr", {}, element("th", { scope: "col" }, "objective"));
  head.append(...columns.map(([heading]) => element("th", { scope: "col" }, heading)));
  const body = rows.map((row) =>
    element("tr", {}, element("th", { scope: "row" }, row.objective),
      ...columns.map(([, field]) => element("td", {}, row.shown[field] ?? ""))));
  byId("points").replaceChildren(element("thead", {}, head), element("tbody", {}, ...body));
}

/** Bars, one below the other, of stacked values: `stacks` is [[label, values, colour], ...]. */
function bars(names, stacks, settings) {
  const totals = names.map((_, i) => stacks.reduce((sum, [, values]) => sum + values[i], 0));
  const plot = figure({
    y_range: [...names].reverse(),
    x_range: [0, 1.03 * Math.max(...totals, 1e-9)],
    height: 110 + (names.length > 12 ? 18 : 34) * names.length,
    tools: "",
    toolbar_location: null,
    ...settings,
  });
  let left = names.map(() => 0);
  for (const [label, values, fillColor] of stacks) {
    const right = values.map((value, i) => left[i] + value);
    const source = new Bokeh.ColumnDataSource({
      data: { name: names, left, right, told: names.map((name, i) => [["", name], [label, `${values[i].toFixed(4)} nats`]]) },
    });
    plot.hbar({
      y: { field: "name" }, left: { field: "left" }, right: { field: "right" }, height: 0.7, source,
      fill_color: fillColor, line_color: color("--ground"), legend_label: label,
    });
    left = right;
  }
  finishLegend(plot);
  plot.add_tools(hover());
  return plot;
}

async function split() {
  const [first, second] = series();
  const groups = chosen.groups.filter((group) => group.residual !== null && group.collateral !== null);
  const elsewhere = chosen.groups.filter((group) => group.collateral_elsewhere !== null);
  byId("no-split").hidden = groups.length + elsewhere.length > 0;
  byId("split-chart").hidden = !groups.length;
  byId("elsewhere-chart").hidden = !elsewhere.length;
  if (groups.length) {
    const of = (field) => groups.map((group) => group[field]);
    const cost = groups[0].smallest_cost;
    const original = cost === null || groups[0].num_graded ? [] : [cost];
    await draw(
      bars(
        distinctNames([...original.map(() => "original"), ...of("name")]),
        [
          ["residual", [...original, ...of("residual")], second],
          ["collateral", [...original.map(() => 0), ...of("collateral")], first],
        ],
        { x_axis_label: "nats per marked token" },
      ),
      byId("split-chart"),
    );
  }
  if (elsewhere.length) {
    await draw(
      bars(
        distinctNames(elsewhere.map((group) => group.name)),
        [["KL to the original", elsewhere.map((group) => group.collateral_elsewhere), first]],
        { x_axis_label: "nats per other token" },
      ),
      byId("elsewhere-chart"),
    );
  }
}

/** A category of a chart is its name: equal ones get a number. */
function distinctNames(names) {
  return names.map((name, i) => {
    const earlier = names.slice(0, i).filter((other) => other === name).length;
    return earlier ? `${name} (${earlier + 1})` : name;
  });
}

/** Runs the plotting library. It lies in the page as text, so that it delays nothing before it. */
function loadBokeh() {
  const script = document.createElement("script");
  script.textContent = byId("bokeh").textContent;
  document.head.append(script);
}

// Once what needs no chart has been painted.
let drawing = new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve))).then(loadBokeh);

/** Draws all charts again, after those that are being drawn. */
function drawCharts() {
  drawing = drawing.then(async () => {
    for (const view of views) for (const one of [view].flat()) one.remove?.();
    views = [];
    await tradeOff();
    await split();
  });
  return drawing;
}

// --- Lists, a page at a time ----------------------------------------------------------------------

/** Shows `items` a page at a time in `list`, with buttons in `pager`. */
class Pages {
  constructor(name, size, show) {
    this.list = byId(`${name}-list`);
    this.count = byId(`${name}-count`);
    this.size = size;
    this.show = show;
    this.previous = element("button", { type: "button" }, "Previous");
    this.next = element("button", { type: "button" }, "Next");
    this.place = element("span", {});
    byId(`${name}-pager`).append(this.previous, this.place, this.next);
    this.previous.addEventListener("click", () => this.turn(-1));
    this.next.addEventListener("click", () => this.turn(1));
  }

  set(items, description) {
    this.items = items;
    this.page = 0;
    this.count.textContent = description;
    this.render();
  }

  turn(by) {
    this.page += by;
    this.render();
    this.list.querySelector("h3")?.focus();
  }

  render() {
    const last = Math.max(0, Math.ceil(this.items.length / this.size) - 1);
    const start = this.page * this.size;
    const shown = this.items.slice(start, start + this.size);
    this.list.replaceChildren(...shown.map(this.show));
    this.list.setAttribute("start", start + 1);
    this.previous.disabled = this.page === 0;
    this.next.disabled = this.page >= last;
    this.place.textContent = shown.length ? `${start + 1} to ${start + shown.length} of ${this.items.length}` : "";
  }
}

// --- Outputs --------------------------------------------------------------------------------------

const [CHANGED, UNWANTED] = [1, 2];
let outputs = [];

/** A text of a model; an Arabic or Hebrew one runs from right to left. */
const paragraph = (...nodes) => element("p", { dir: "auto" }, ...nodes);

/** A paragraph of [text, marks] pieces; `name` is the element for what differs. */
function marked(pieces, name) {
  const nodes = pieces.map(([text, marks]) => {
    const inner = marks & UNWANTED ? element("mark", {}, text) : text;
    return marks & CHANGED ? element(name, {}, inner) : inner;
  });
  return paragraph(...(nodes.length ? nodes : [element("em", {}, "(nothing)")]));
}

/** A long input is folded after its first characters. */
function inputText(input) {
  if (input.length <= 500) return paragraph(input);
  return element("details", {}, element("summary", { dir: "auto" }, `${input.slice(0, 250)}…`), paragraph(input));
}

function outputCard(output) {
  const [before, after] = output.lengths;
  const facts = [output.kind, `${percent(output.share)} of the words changed`, `${before} → ${after} words`, ...output.signs];
  return element(
    "li", {},
    element("h3", { tabindex: "-1" }, `${output.id} · ${facts.join(" · ")}`),
    element("h4", {}, "input"),
    inputText(output.input),
    element(
      "div", { class: "texts" },
      element("div", {}, element("h4", {}, "original"), marked(output.original, "del")),
      element("div", {}, element("h4", {}, "patched"), marked(output.current, "ins")),
    ),
  );
}

const textOf = (pieces) => pieces.map(([text]) => text).join("");
const growth = (output) => output.lengths[1] - output.lengths[0];
const ORDERS = {
  share: (one, other) => other.share - one.share,
  longer: (one, other) => growth(other) - growth(one),
  shorter: (one, other) => growth(one) - growth(other),
};

function filterOutputs() {
  const kind = byId("kind").value;
  const words = byId("search").value.trim().toLowerCase();
  let found = outputs.filter((output) => !kind || output.kind === kind);
  if (words) {
    found = found.filter((output) => {
      output.text ??= [output.id, output.input, textOf(output.original), textOf(output.current)].join("\n").toLowerCase();
      return output.text.includes(words);
    });
  }
  const order = ORDERS[byId("order").value];
  if (order) found = [...found].sort(order);
  const { num_outputs: total, num_drawn: drawn, all_outputs: file } = data.comparisons[chosen.number];
  const left = total - outputs.length;
  const rest = left ? ` (in this page: the ${outputs.length - drawn} worst changes of ${total}, and ${drawn} drawn from the others; all are in ${file})` : "";
  outputPages.set(found, `${found.length} of ${outputs.length} outputs${rest}`);
}

function showOutputs() {
  const { kinds } = data.comparisons[chosen.number];
  const names = Object.keys(kinds).filter((kind) => kinds[kind]);
  fill(byId("kind"), ["", ...names], ["any", ...names.map((kind) => `${kind} (${kinds[kind]}): ${data.kinds[kind]}`)]);
  outputs = island(`outputs-${chosen.number}`);
  filterOutputs();
}

// --- Tokens ---------------------------------------------------------------------------------------

const SHADES = [0.01, 0.05, 0.2, 0.8, 3];
const shadeOf = (kl) => SHADES.filter((bound) => kl >= bound).length;

function tokenText(row, i) {
  const piece = row.pieces[i].trim() || (i === row.pieces.length - 1 ? "end of text" : "no text");
  const numbers = ["kl", "residual", "collateral", "smallest_cost"]
    .filter((name) => row.is_negative[i] || name === "kl")
    .map((name) => `${name === "kl" ? "KL" : name.replace("_", " ")} ${row[name][i] ?? "not finite"}`);
  return `${piece}${row.is_negative[i] ? ", marked" : ""}: ${numbers.join(", ")}`;
}

function tokenCard(row) {
  const value = element("p", { class: "value", "aria-hidden": "true" }, "");
  const box = element("p", { class: "tokens", dir: "auto", role: "listbox", "aria-orientation": "horizontal", "aria-label": `Tokens of ${row.id}` });
  row.pieces.forEach((piece, i) => {
    const shown = piece.trim() ? piece : `${piece}${i === row.pieces.length - 1 ? "⏎" : "·"}`;
    const level = shadeOf(row.kl[i] ?? Infinity);
    box.append(element("span", {
      class: `k${level}${row.is_negative[i] ? " negative" : ""}`,
      role: "option",
      "aria-selected": "false",
      tabindex: i ? "-1" : "0",
      "aria-label": tokenText(row, i),
    }, shown));
  });
  const tokens = [...box.children];
  const tell = (token) => {
    if (token.parentElement === box) value.textContent = token.getAttribute("aria-label");
  };
  box.addEventListener("mouseover", (event) => tell(event.target));
  box.addEventListener("focusin", (event) => {
    for (const token of tokens) {
      token.tabIndex = token === event.target ? 0 : -1;
      token.setAttribute("aria-selected", token === event.target);
    }
    tell(event.target);
  });
  box.addEventListener("keydown", (event) => {
    const here = tokens.indexOf(document.activeElement);
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (tokens[to]) {
      event.preventDefault();
      tokens[to].focus();
    }
  });
  const total = row.kl.reduce((sum, kl) => sum + (kl ?? 0), 0);
  return element("li", {}, element("h3", { tabindex: "-1" }, `${row.id} · ${total.toFixed(2)} nats in all`), box, value);
}

function shades() {
  const labels = SHADES.map((bound) => element("span", { class: `shade k${shadeOf(bound)}` }, `from ${bound}`));
  byId("shades").append(...labels, element("span", { class: "shade negative" }, "marked"));
}

// --- Start ----------------------------------------------------------------------------------------

const outputPages = new Pages("outputs", 25, outputCard);
const tokenPages = new Pages("tokens", 10, tokenCard);

/** Hides a section and the link to it. */
function hide(id, isHidden) {
  byId(id).hidden = isHidden;
  document.querySelector(`nav a[href="#${id}"]`).hidden = isHidden;
}

function update() {
  choose();
  const hasOutputs = chosen.number >= 0;
  if (hasOutputs) showOutputs();
  const tokens = hasOutputs ? island(`tokens-${chosen.number}`) : [];
  tokenPages.set(tokens, `${tokens.length} outputs`);
  for (const id of ["signs", "outputs"]) hide(id, !hasOutputs);
  hide("tokens", !tokens.length);
  byId("arm").parentElement.hidden = !hasOutputs;
  return drawCharts();
}

/** Calls `action` once typing has stopped. */
function afterTyping(action) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, 150);
  };
}

shades();
for (const form of document.forms) form.addEventListener("submit", (event) => event.preventDefault());
for (const id of ["task", "decoder", "arm"]) byId(id).addEventListener("change", update);
for (const id of ["x", "y"]) byId(id).addEventListener("change", drawCharts);
for (const id of ["kind", "order"]) byId(id).addEventListener("change", filterOutputs);
byId("search").addEventListener("input", afterTyping(filterOutputs));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
update();
