"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

// Hover: the nearest point of a chart says what it is.
const short = value => String(Number(value.toPrecision(4)));
const place = (axis, value) => {
  const [low, high, at] = axis.log ? [axis.low, axis.high, value].map(Math.log) : [axis.low, axis.high, value];
  const part = (at - low) / (high - low);
  return axis.falling ? 1 - part : part;
};
const pointsOf = chart => {
  const [left, right, top, bottom] = chart.frame;
  return chart.lines.flatMap(line => line.p.map(([tag, x, y, low, high, count]) => ({
    px: left + place(chart.x, x) * (right - left), py: bottom - place(chart.y, y) * (bottom - top),
    tag, x, y, low, high, count, line,
  })));
};
const textOf = (chart, p) => {
  const lines = [p.line.n ?? data.names[p.line.m].join("  ")];
  if (p.tag !== null && chart.tag) lines.push(`${chart.tag} ${p.tag}`);
  if (!chart.x.named) lines.push(`${chart.x.label}: ${short(p.x)}`);
  const spread = p.count > 1 ? `, mean of ${p.count}` + (p.high > p.low ? ` (${short(p.low)} to ${short(p.high)})` : "") : "";
  lines.push(`${chart.y.label}: ${short(p.y)}${spread}`);
  return lines.join("\n");
};
const hide = () => {
  tip.hidden = true;
  document.querySelectorAll(".at").forEach(ring => ring.remove());
};
const show = (svg, chart, event) => {
  const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
  const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
  chart.points ??= pointsOf(chart);
  let best = null, least = 26 ** 2;
  for (const point of chart.points) {
    const distance = (point.px - x) ** 2 + (point.py - y) ** 2;
    if (distance < least) [best, least] = [point, distance];
  }
  hide();
  if (best === null) return;
  const ring = document.createElementNS(svg.namespaceURI, "circle");
  for (const [name, value] of [["class", "at"], ["cx", best.px], ["cy", best.py], ["r", 6]]) ring.setAttribute(name, value);
  svg.append(ring);
  tip.textContent = textOf(chart, best);
  tip.hidden = false;
  const left = box.left + best.px / scale, above = box.top + best.py / scale;
  tip.style.left = `${Math.max(12, Math.min(left + 12, innerWidth - tip.offsetWidth - 12))}px`;
  const under = above + 14 + tip.offsetHeight < innerHeight;
  tip.style.top = `${under ? above + 14 : above - 14 - tip.offsetHeight}px`;
};
document.querySelectorAll("figure[data-chart] svg").forEach(svg => {
  const chart = data.charts[svg.closest("figure").dataset.chart];
  svg.addEventListener("pointermove", event => show(svg, chart, event));
  svg.addEventListener("pointerdown", event => show(svg, chart, event));
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
});
addEventListener("scroll", hide, {passive: true});
document.addEventListener("pointerdown", event => { if (!event.target.closest("figure[data-chart] svg")) hide(); });

// A method under the pointer stands out in every chart.
const marked = new Map();
document.querySelectorAll("svg [data-m]").forEach(part => {
  if (!marked.has(part.dataset.m)) marked.set(part.dataset.m, []);
  marked.get(part.dataset.m).push(part);
});
document.querySelectorAll(".methods li").forEach(item => {
  const mark = on => () => {
    document.body.classList.toggle("focus", on);
    (marked.get(item.dataset.m) ?? []).forEach(part => part.classList.toggle("on", on));
  };
  for (const [name, on] of [["pointerenter", true], ["focus", true], ["pointerleave", false], ["blur", false]])
    item.addEventListener(name, mark(on));
});

// The table: sorted by a click on a heading, copied as text.
const table = document.getElementById("rounds");
if (table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map(row => {
      const text = row.cells[column].textContent;
      return {row, text, number: text === "" ? NaN : Number(text)};
    });
    rows.sort((a, b) => {
      if (a.text === "" || b.text === "") return (a.text === "") - (b.text === "");
      const numbers = !Number.isNaN(a.number) && !Number.isNaN(b.number);
      const found = numbers ? a.number - b.number : a.text.localeCompare(b.text);
      return up ? found : -found;
    });
    body.append(...rows.map(item => item.row));
  }));
  const full = new Map(data.names.map(([label, name]) => [label, name]));
  const cells = () => [
    heads.map(head => head.textContent),
    ...[...body.rows].map(row => [...row.cells].map((c, i) => i ? c.textContent : full.get(c.textContent))),
  ];
  const markdown = () => {
    const safe = text => text.replace(/\\/g, "\\\\").replace(/\|/g, "\\|").replace(/</g, "&lt;").replace(/[\r\n]/g, " ");
    const lines = cells().map(row => "| " + row.map(safe).join(" | ") + " |");
    lines.splice(1, 0, "|" + " --- |".repeat(heads.length));
    return lines.join("\n") + "\n";
  };
  const csv = () => cells().map(row => row.map(
    text => /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text).join(",")).join("\n") + "\n";
  const copy = async (button, text) => {
    const label = button.dataset.label ??= button.textContent;
    let done = true;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Could not copy";
    button.dataset.copied = done;
    setTimeout(() => { button.textContent = label; }, 1500);
  };
  document.getElementById("md").addEventListener("click", event => copy(event.currentTarget, markdown()));
  document.getElementById("csv").addEventListener("click", event => copy(event.currentTarget, csv()));
  document.getElementById("all")?.addEventListener("click", event => {
    body.classList.remove("short");
    event.currentTarget.remove();
  });
}
