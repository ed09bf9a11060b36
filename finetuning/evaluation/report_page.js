"use strict";
window.onerror = message => { document.documentElement.dataset.error = message; };
const state = () => new URLSearchParams(location.hash.slice(1));
for (const box of document.querySelectorAll(".sortable")) {
  const name = box.dataset.name, body = box.querySelector("tbody"), rows = [...body.rows];
  const heads = [...box.querySelectorAll("th[data-key]")], search = box.querySelector("input");
  const select = box.querySelector("select"), turn = box.querySelector(".controls button");
  const said = box.querySelector("output");
  const put = (what, value) => {
    const now = state();
    if (value) now.set(name + what, value); else now.delete(name + what);
    history.replaceState(null, "", "#" + now);
    apply();
  };
  const held = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (column, sign) => (a, b) => {
    const [x, y] = [held(a, column), held(b, column)];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  };
  const apply = () => {
    const asked = state().get(name + "sort") || "row", down = asked.startsWith("-");
    const head = heads.find(one => one.dataset.key === (down ? asked.slice(1) : asked)) || heads[0];
    for (const one of heads) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    select.value = head.dataset.key;
    turn.textContent = down ? "\u2193 descending" : "\u2191 ascending";
    body.append(...[...rows].sort(compare(Number(head.dataset.column), down ? -1 : 1)));
    const text = (state().get(name + "filter") || "").toLowerCase();
    if (search.value.toLowerCase() !== text) search.value = text;
    let left = 0;
    for (const row of rows) left += !(row.hidden = !row.dataset.text.includes(text));
    said.textContent = `${left} of ${rows.length} rows`;
  };
  const sorted = () => state().get(name + "sort") || "row";
  for (const head of heads) head.querySelector("button").addEventListener("click", () =>
    put("sort", sorted() === head.dataset.key ? "-" + head.dataset.key : head.dataset.key));
  select.addEventListener("change", () => put("sort", select.value));
  turn.addEventListener("click", () => put("sort", sorted().startsWith("-") ? sorted().slice(1) : "-" + sorted()));
  search.addEventListener("input", () => put("filter", search.value));
  addEventListener("hashchange", apply);
  box.querySelector(".controls").hidden = false;
  apply();
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
document.documentElement.dataset.ready = "yes";
