async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  document.execCommand("copy");
  area.remove();
}

for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  const sortBy = (head, i) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const rows = [...body.rows].map(row => [value(row, i), row]);
    const missing = v => v === "-" || v === "";
    rows.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const numeric = !isNaN(a) && !isNaN(b);
      return sign * (numeric ? a - b : a.localeCompare(b, undefined, {numeric: true}));
    });
    body.append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, i) => {
    head.addEventListener("click", () => sortBy(head, i));
    head.addEventListener("keydown", event => { if (event.key === "Enter") sortBy(head, i); });
  });
  const tools = table.parentElement.previousElementSibling;
  tools.querySelector("input")?.addEventListener("input", event => {
    const words = event.target.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
  tools.querySelector(".copy").addEventListener("click", async event => {
    const rows = [...body.rows].filter(row => !row.hidden);
    const lines = [heads.map(head => head.textContent.trim()),
      ...rows.map(row => heads.map((_, i) => value(row, i)))];
    await copy(lines.map(line => line.join("\t")).join("\n") + "\n");
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy as TSV"; }, 1500);
  });
}
