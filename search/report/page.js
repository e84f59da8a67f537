
"use strict";
// Points one trial out in every plot, filters by ranges of params, and sorts tables. Without it
// the page shows the same. What a trial is is read from its row in the table.
(() => {
  const REACH_PX = 18;
  const SVG = "http://www.w3.org/2000/svg";
  const tip = document.getElementById("tip");
  const rows = new Map();
  const marks = new Map();
  for (const row of document.querySelectorAll("tr[data-t]")) rows.set(row.dataset.t, row);
  for (const mark of document.querySelectorAll("svg [data-t]")) {
    const key = mark.dataset.t;
    if (!marks.has(key)) marks.set(key, []);
    marks.get(key).push(mark);
  }
  let shown = null;
  let kept = null;

  // One trial in all plots

  function highlight(key) {
    if (key === shown) return;
    document.querySelectorAll(".over").forEach((sheet) => sheet.remove());
    if (shown !== null) rows.get(shown)?.classList.remove("on");
    shown = key;
    if (key === null) return;
    for (const mark of marks.get(key) ?? []) {
      const svg = mark.ownerSVGElement;
      // On a sheet of its own: the marks below, perhaps thousands, need not be painted again.
      let over = svg.parentNode.querySelector(".over");
      if (!over) {
        over = document.createElementNS(SVG, "svg");
        over.setAttribute("class", "over");
        over.setAttribute("viewBox", svg.getAttribute("viewBox"));
        over.setAttribute("aria-hidden", "true");
        svg.parentNode.append(over);
      }
      const copy = mark.cloneNode(true);
      copy.removeAttribute("data-t");
      over.append(copy);
    }
    rows.get(key)?.classList.add("on");
  }

  function tell(key, x, y) {
    const row = rows.get(key);
    tip.hidden = !row;
    if (!row) return;
    const list = document.createElement("dl");
    const heads = row.closest("table").tHead.rows[0].cells;
    [...row.cells].forEach((cell, index) => {
      const name = document.createElement("dt");
      const value = document.createElement("dd");
      name.textContent = heads[index].textContent;
      value.textContent = cell.textContent || "none";
      list.append(name, value);
    });
    tip.replaceChildren(list);
    const box = tip.getBoundingClientRect();
    const left = x + 16 + box.width > innerWidth ? x - 16 - box.width : x + 16;
    const top = Math.min(Math.max(4, y + 12), innerHeight - box.height - 4);
    tip.style.transform = `translate(${Math.max(4, left)}px, ${top}px)`;
  }

  function rest() {
    tip.hidden = true;
    highlight(kept);
  }

  const placesOf = new WeakMap();
  function places(mark) {
    if (!placesOf.has(mark)) {
      const found = mark.tagName === "polyline"
        ? [...mark.points].map((point) => [point.x, point.y])
        : mark.tagName === "use" ? [[mark.x.baseVal.value, mark.y.baseVal.value]] : [];
      placesOf.set(mark, found);
    }
    return placesOf.get(mark);
  }

  function distance([px, py], [ax, ay], [bx, by]) {
    const dx = bx - ax, dy = by - ay;
    const along = dx || dy ? ((px - ax) * dx + (py - ay) * dy) / (dx * dx + dy * dy) : 0;
    const share = Math.min(1, Math.max(0, along));
    return Math.hypot(px - ax - share * dx, py - ay - share * dy);
  }

  function toSvg(svg, event) {
    const matrix = svg.getScreenCTM();
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    return { at: [point.x, point.y], scale: matrix.a };
  }

  function nearest(svg, event) {
    const { at, scale } = toSvg(svg, event);
    let best = null;
    let reach = REACH_PX / scale;
    for (const mark of svg.querySelectorAll("[data-t]:not(.off)")) {
      const points = places(mark);
      points.forEach((point, index) => {
        const away = distance(at, points[Math.max(0, index - 1)], point);
        if (away < reach) {
          reach = away;
          best = mark.dataset.t;
        }
      });
    }
    return best;
  }

  for (const svg of document.querySelectorAll("figure svg")) {
    let last = null;
    svg.addEventListener("pointermove", (event) => {
      if (!last) {
        requestAnimationFrame(() => {
          const key = nearest(svg, last);
          if (key === null) rest();
          else {
            highlight(key);
            tell(key, last.clientX, last.clientY);
          }
          last = null;
        });
      }
      last = event;
    });
    svg.addEventListener("pointerleave", () => { if (!last) rest(); else requestAnimationFrame(rest); });
    svg.addEventListener("click", (event) => {
      const key = nearest(svg, event);
      keep(key === kept ? null : key);
      if (key === null && !event.target.classList.contains("grip")) clear(svg);
    });
  }

  function keep(key) {
    kept = key;
    highlight(key);
  }

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    keep(null);
    rest();
    document.querySelectorAll("svg").forEach(clear);
  });

  // Ranges of params

  const ranges = new Map();
  function clear(svg) {
    for (const axis of svg.querySelectorAll(".upright")) ranges.delete(axis);
    filter(svg);
  }

  function filter(svg) {
    const axes = [...svg.querySelectorAll(".upright")];
    if (!axes.length) return;
    let left = 0;
    const threads = svg.querySelectorAll(".thread[data-t]");
    const inside = new Set();
    for (const thread of threads) {
      const points = places(thread);
      const fits = axes.every((axis, index) => {
        const range = ranges.get(axis);
        return !range || (points[index][1] >= range[0] && points[index][1] <= range[1]);
      });
      if (fits) {
        inside.add(thread.dataset.t);
        left += 1;
      }
    }
    const isFiltered = axes.some((axis) => ranges.has(axis));
    const part = svg.closest("main");
    for (const row of part.querySelectorAll("tr[data-t]")) {
      const isOff = isFiltered && !inside.has(row.dataset.t);
      row.classList.toggle("off", isOff);
      for (const mark of marks.get(row.dataset.t) ?? []) mark.classList.toggle("off", isOff);
    }
    for (const axis of axes) {
      const range = ranges.get(axis);
      axis.querySelector(".brush")?.remove();
      if (!range) continue;
      const grip = axis.querySelector(".grip");
      const box = document.createElementNS(SVG, "rect");
      box.setAttribute("class", "brush");
      box.setAttribute("x", Number(axis.dataset.x) - 7);
      box.setAttribute("width", 14);
      box.setAttribute("y", range[0]);
      box.setAttribute("height", range[1] - range[0]);
      axis.insertBefore(box, grip);
    }
    part.querySelector(".count").textContent = isFiltered
      ? ` ${left} of ${threads.length} measured trials are within the ranges chosen above.` : "";
  }

  for (const grip of document.querySelectorAll(".grip")) {
    const axis = grip.parentNode;
    const svg = grip.ownerSVGElement;
    let start = null;
    grip.addEventListener("pointerdown", (event) => {
      start = toSvg(svg, event).at[1];
      grip.setPointerCapture(event.pointerId);
    });
    grip.addEventListener("pointermove", (event) => {
      if (start === null) return;
      const end = toSvg(svg, event).at[1];
      if (Math.abs(end - start) < 4) return;
      ranges.set(axis, [Math.min(start, end), Math.max(start, end)]);
      filter(svg);
    });
    grip.addEventListener("pointerup", (event) => {
      if (start !== null && Math.abs(toSvg(svg, event).at[1] - start) < 4) {
        ranges.delete(axis);
        filter(svg);
      }
      start = null;
    });
    grip.addEventListener("pointercancel", () => { start = null; });
  }

  // Tables

  function valueOf(row, index) {
    const text = row.cells[index].textContent;
    if (text === "") return null;
    return Number.isNaN(Number(text)) ? text : Number(text);
  }

  function compare(one, other) {
    if (typeof one === typeof other) return one < other ? -1 : one > other ? 1 : 0;
    return typeof one === "number" ? -1 : 1;
  }

  for (const table of document.querySelectorAll(".sortable")) {
    const body = table.tBodies[0];
    for (const button of table.querySelectorAll("th button")) {
      button.addEventListener("click", () => {
        const head = button.parentElement;
        const way = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", way);
        const sign = way === "ascending" ? 1 : -1;
        const found = [...body.rows].map((row) => [valueOf(row, head.cellIndex), row]);
        // What has no value stays at the end, whichever way.
        found.sort(([one], [other]) => {
          if (one === null || other === null) return (one === null) - (other === null);
          return sign * compare(one, other);
        });
        body.append(...found.map(([, row]) => row));
      });
    }
    // The rows are one stop of the Tab key; arrows go from one to the next.
    [...body.rows].forEach((row, index) => { row.tabIndex = index ? -1 : 0; });
    body.addEventListener("keydown", (event) => {
      const row = event.target.closest("tr");
      if (event.key === "Enter") keep(kept === row.dataset.t ? null : row.dataset.t);
      const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
      if (!step) return;
      let next = row[step];
      while (next?.classList.contains("off")) next = next[step];
      if (!next) return;
      event.preventDefault();
      row.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
    body.addEventListener("focusin", (event) => highlight(event.target.closest("tr").dataset.t));
    body.addEventListener("focusout", rest);
    body.addEventListener("pointerover", (event) => highlight(event.target.closest("tr").dataset.t));
    body.addEventListener("pointerleave", rest);
    body.addEventListener("click", (event) => {
      const key = event.target.closest("tr").dataset.t;
      keep(key === kept ? null : key);
    });
  }

  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
