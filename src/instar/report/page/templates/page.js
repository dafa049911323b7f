"use strict";
(() => {
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Theme: the system's unless the reader chose one. Storage may be forbidden to files.
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const store = (value) => { try { return value === undefined ? localStorage.getItem("instar-theme") : localStorage.setItem("instar-theme", value); } catch { return null; } };
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const showTheme = () => { button.textContent = isDark() ? "Light" : "Dark"; button.setAttribute("aria-pressed", String(isDark())); };
  const stored = store();
  if (stored === "dark" || stored === "light") root.dataset.theme = stored;
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; store(root.dataset.theme); showTheme(); });
  systemDark.addEventListener("change", showTheme);
  showTheme();

  // The section that is being read, in the list of sections.
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.getAttribute("href").slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  for (const section of document.querySelectorAll("main > section")) watch.observe(section);

  // A link to a class opens it.
  const openTarget = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) { target.open = true; target.scrollIntoView(); }
  };
  addEventListener("hashchange", openTarget);
  openTarget();

  // On paper nothing opens: what is worth it is open while it is printed.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details.printed:not([open])")];
    for (const part of unfolded) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of unfolded) part.open = false; unfolded = []; });

  // Figures as files: the panels as they stand, in the light colours, on white.
  const save = (blob, name) => {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  const NS = "http://www.w3.org/2000/svg";
  const drawing = (figure) => {
    const pieces = [...figure.querySelectorAll(".panel svg")];
    const origin = figure.querySelector(".panels").getBoundingClientRect(); // of the first row
    const places = pieces.map((piece) => piece.getBoundingClientRect());
    const width = Math.max(...places.map((place) => place.right)) - origin.left;
    const height = Math.max(...places.map((place) => place.bottom)) - origin.top;
    const whole = document.createElementNS(NS, "svg");
    const attributes = { xmlns: NS, width, height, viewBox: `0 0 ${width} ${height}` };
    for (const [name, value] of Object.entries(attributes)) whole.setAttribute(name, value);
    const title = document.createElementNS(NS, "title");
    title.textContent = figure.querySelector("figcaption strong").textContent;
    const paper = document.createElementNS(NS, "rect");
    for (const [name, value] of Object.entries({ width: "100%", height: "100%", fill: "#ffffff" })) paper.setAttribute(name, value);
    whole.append(title, paper);
    pieces.forEach((piece, k) => {
      const copy = piece.cloneNode(true), place = places[k];
      for (const image of copy.querySelectorAll(".on-dark")) image.remove();
      const box = { x: place.left - origin.left, y: place.top - origin.top, width: place.width, height: place.height };
      for (const [name, value] of Object.entries(box)) copy.setAttribute(name, value);
      whole.append(copy);
    });
    const text = new XMLSerializer().serializeToString(whole);
    const plain = text.replace(/var\(--k[0-9a-f]{6},\s*(#[0-9a-f]{6})\)/g, "$1").replace(/var\(--sans,\s*sans-serif\)/g, "sans-serif");
    return { blob: new Blob([plain], { type: "image/svg+xml" }), text: plain, width, height };
  };
  const savePng = ({ text, width, height }, name) => {
    const image = new Image();
    image.onload = () => {
      const canvas = make("canvas", { width: 2.5 * width, height: 2.5 * height });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, `${name}.png`), "image/png");
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  };
  document.addEventListener("click", (event) => {
    const tool = event.target.closest("button[data-save]");
    if (!tool) return;
    const figure = tool.closest("figure"), name = figure.dataset.name, drawn = drawing(figure);
    if (tool.dataset.save === "png") savePng(drawn, name); else save(drawn.blob, `${name}.svg`);
  });

  // Instance tables.
  const ROW = 45, SPARE = 8, PRINTED = 12;
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const opened = (column) => {
    const raw = bytes(column.data), type = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array }[column.bits];
    return { ...column, levels: new type(raw.buffer) };
  };
  const written = (column, row) => {
    const level = column.levels[row];
    if (level === column.none) return "–";
    if (column.kind === "word") return column.words[level] ?? String(level);
    const text = (column.offset + column.scale * level).toFixed(column.digits);
    return /[1-9]/.test(text) ? text : text.replace("-", ""); // no minus before a rounded zero
  };
  const shown = (column, row) => { const text = written(column, row); return column.kind === "number" ? text.replace("-", "−") : text; };
  const sprites = ({ across, kind }, key) => {
    const urls = [], per = across ** 2;
    return (row) => {
      const sheet = Math.floor(row / per), place = row % per;
      const source = document.getElementById(`${key}-sheet-${sheet}`);
      const sprite = make("span", { className: "sprite" });
      if (!source?.nextSibling) return sprite; // still being read: drawn again when all are there
      urls[sheet] ??= URL.createObjectURL(new Blob([bytes(source.textContent)], { type: kind }));
      sprite.style.background = `url(${urls[sheet]}) -${40 * (place % across)}px -${40 * Math.floor(place / across)}px / ${40 * across}px auto`;
      return sprite;
    };
  };

  const table = (content) => {
    const place = document.querySelector(`[data-table="${content.key}"]`);
    const [viewport, form, status] = [".viewport", ".filters", ".count"].map((name) => place.querySelector(name));
    const [head, body] = [place.querySelector("thead"), place.querySelector("tbody")];
    const columns = content.columns.map(opened);
    const thumbnail = content.atlas && sprites(content.atlas, content.key);
    const filters = [];
    let order = Uint32Array.from({ length: content.rows }, (_, k) => k);
    let sorted = { column: 0, down: false };
    let first = -1;

    let printing = false;
    const draw = (force) => {
      if (printing) return;
      const from = Math.max(0, Math.floor(viewport.scrollTop / ROW) - SPARE);
      if (!force && from === first) return;
      first = from;
      const until = Math.min(order.length, from + Math.ceil(viewport.clientHeight / ROW) + 2 * SPARE);
      const gap = (rows) => {
        const cell = make("td", { colSpan: columns.length + (thumbnail ? 1 : 0) });
        cell.style.height = `${rows * ROW}px`;
        const line = make("tr", { className: "gap" }, cell);
        line.setAttribute("aria-hidden", "true");
        return line;
      };
      body.replaceChildren(gap(from), ...lines(from, until), gap(order.length - until));
    };
    const lines = (from, until) => Array.from({ length: until - from }, (_, k) => {
      const row = order[from + k];
      const line = make("tr");
      line.setAttribute("aria-rowindex", String(from + k + 2));
      if (thumbnail) line.append(make("td", { className: "thumb" }, thumbnail(row)));
      for (const column of columns) line.append(make("td", { className: column.kind, textContent: shown(column, row) }));
      return line;
    });
    // On paper nothing scrolls: the first rows as they are sorted and filtered, and how many more there are.
    addEventListener("beforeprint", () => {
      const count = Math.min(PRINTED, order.length);
      printing = true;
      body.replaceChildren(...lines(0, count));
      status.dataset.printed = count < order.length ? `; the first ${count} are printed` : "";
    });
    addEventListener("afterprint", () => { printing = false; draw(true); });
    const sort = () => {
      const { levels, none, kind, words } = columns[sorted.column];
      // Words by the alphabet; what is missing comes last both ways; ties keep the order of positions.
      let rank = levels;
      if (kind === "word") {
        const byName = words.map((_, k) => k).sort((a, b) => words[a].localeCompare(words[b], "en"));
        const places = new Map(byName.map((code, k) => [code, k]));
        rank = Int32Array.from(levels, (code) => places.get(code) ?? none);
      }
      // One number for rank and position: such are sorted without calling back, ten times as fast.
      const above = 2 ** 32;
      const place = (row) => (levels[row] === none ? above : sorted.down ? above - 1 - rank[row] : rank[row]);
      const keys = Float64Array.from(order, (row) => place(row) * content.rows + row).sort();
      order = Uint32Array.from(keys, (key) => key % content.rows);
      [...head.querySelectorAll("th[data-column]")].forEach((cell, k) => cell.setAttribute("aria-sort", k === sorted.column ? (sorted.down ? "descending" : "ascending") : "none"));
      viewport.scrollTop = 0;
      draw(true);
    };
    const filter = () => {
      const tests = filters.map((one) => one()).filter(Boolean);
      const kept = [];
      for (let row = 0; row < content.rows; row++) if (tests.every((test) => test(row))) kept.push(row);
      order = Uint32Array.from(kept);
      status.textContent = `${order.length.toLocaleString("en")} of ${content.rows.toLocaleString("en")} images`;
      place.querySelector("table").setAttribute("aria-rowcount", String(order.length + 1));
      sort();
    };

    const heads = make("tr");
    if (thumbnail) heads.append(make("th", { className: "thumb", scope: "col", textContent: "image" }));
    columns.forEach((column, k) => {
      const toggle = make("button", { type: "button", title: column.hint });
      if (column.group) toggle.append(make("small", { textContent: column.group }));
      toggle.append(column.title);
      toggle.addEventListener("click", () => { sorted = { column: k, down: sorted.column === k ? !sorted.down : false }; sort(); });
      const cell = make("th", { scope: "col", className: column.kind }, toggle);
      cell.dataset.column = String(k);
      heads.append(cell);
    });
    head.append(heads);

    const search = make("input", { type: "search", placeholder: "number, or a word", name: `${content.key}-search` });
    search.addEventListener("input", filter);
    form.append(make("label", {}, "Find", search));
    filters.push(() => {
      const wanted = search.value.trim().toLowerCase();
      if (!wanted) return null;
      if (/^\d+$/.test(wanted)) return (row) => columns[0].levels[row] === Number(wanted);
      const found = columns.filter((column) => column.kind === "word")
        .map((column) => [column.levels, new Set(column.words.flatMap((word, k) => (word.toLowerCase().includes(wanted) ? [k] : [])))]);
      return (row) => found.some(([levels, codes]) => codes.has(levels[row]));
    });
    // A page of many runs has many filters: those of its runs are folded away.
    const words = columns.filter((column) => column.kind === "word"), folded = words.length > 6;
    const more = make("div");
    for (const column of words) {
      const choice = make("select", {}, make("option", { value: "", textContent: "all" }));
      column.words.forEach((word, k) => choice.append(make("option", { value: String(k), textContent: word })));
      choice.addEventListener("change", filter);
      (folded && column.group ? more : form).append(make("label", {}, column.group ? `${column.group}: ${column.title}` : column.title, choice));
      filters.push(() => { const code = Number(choice.value); return choice.value === "" ? null : (row) => column.levels[row] === code; });
    }
    const csv = make("button", { type: "button", className: "tool", textContent: "CSV of these rows" });
    csv.addEventListener("click", () => {
      const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
      const lines = [columns.map((column) => quoted(column.group ? `${column.group}: ${column.title}` : column.title)).join(",")];
      for (const row of order) lines.push(columns.map((column) => quoted(written(column, row))).join(","));
      save(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }), `${content.key}.csv`);
    });
    form.append(csv);
    if (folded) form.append(make("details", {}, make("summary", { textContent: `Filters by run (${more.childElementCount})` }), more));
    form.addEventListener("submit", (event) => event.preventDefault());
    viewport.addEventListener("scroll", () => requestAnimationFrame(() => draw(false)), { passive: true });
    document.addEventListener("DOMContentLoaded", () => draw(true));
    new ResizeObserver(() => draw(true)).observe(viewport);
    filter();
  };
  for (const script of document.querySelectorAll("script.payload")) table(JSON.parse(script.textContent));
  root.dataset.ready = "true";
})();
