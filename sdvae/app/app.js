"use strict";
const form = one("ask"), drop = one("drop"), status = one("status"), result = one("result");
let files = [];
let again = () => {};
let latest = 0;

async function ask(path, body, extra = {}) {
  const query = new URLSearchParams(new FormData(form));
  for (const [name, value] of Object.entries(extra)) query.set(name, value);
  const turn = ++latest;
  status.className = "soft";
  status.textContent = "Computing…";
  result.classList.add("stale");
  try {
    const answer = await fetch(`${path}?${query}`, { method: "POST", body });
    const text = await answer.text();
    if (turn !== latest) return;
    if (!answer.ok) throw new Error(text);
    result.innerHTML = text;
    status.textContent = "";
    update();
  } catch (error) {
    if (turn !== latest) return;
    status.className = "failed";
    status.textContent = error.message;
  } finally {
    if (turn === latest) result.classList.remove("stale");
  }
}

function take(list) {
  files = [...list].slice(0, 2);
  if (!files.length) return;
  one("chosen").textContent = files.map((file) => file.name).join(" and ");
  const [first, second] = files;
  again = second
    ? () => ask("between", new Blob([first, second]), { first: first.size })
    : () => ask("photo", first, { name: first.name });
  again();
}

one("files").addEventListener("change", (event) => take(event.target.files));
one("sample").addEventListener("click", () => (again = () => ask("sample"))());
form.addEventListener("change", (event) => event.target.id === "files" || again());
form.addEventListener("submit", (event) => event.preventDefault());
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
