"use strict";
const root = document.documentElement;
const all = (selector, where = document) => [...where.querySelectorAll(selector)];
const one = (id) => document.getElementById(id);
root.classList.add("js");

// Light and dark.
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.style.colorScheme || (dark.matches ? "dark" : "light")) === "dark";
const theme = one("theme");
const nameTheme = () => (theme.textContent = isDark() ? "Light" : "Dark");
theme.addEventListener("click", () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  nameTheme();
});
dark.addEventListener("change", nameTheme);
nameTheme();

// A slider is a range input that lies over its pictures, so mouse, touch and keys are the browser's. A reel has one below.
document.addEventListener("input", ({ target }) => {
  if (target.matches(".frame input")) target.closest(".frame").style.setProperty("--at", `${target.value}%`);
  if (target.matches(".reel input")) {
    all("figure", target.closest(".reel")).forEach((frame, place) => frame.classList.toggle("on", place === Number(target.value)));
  }
});

// What the sliders show: 0 is the original, 1 the first VAE.
function show() {
  const [left, right] = [Number(one("left").value), Number(one("right").value)];
  const judged = right || left;
  const isError = one("error").getAttribute("aria-pressed") === "true";
  for (const layer of all(".layer")) {
    const side = Number(layer.dataset.side);
    const isMap = layer.matches(".error");
    layer.classList.toggle("left", !isMap && side === left);
    layer.classList.toggle("right", isMap === (isError && judged > 0) && side === (isError ? judged : right));
  }
  for (const part of all("[data-vae]")) {
    part.classList.toggle("on", Number(part.dataset.vae) === judged - 1);
  }
  const names = [left, right].map((side) => one("left").options[side].text);
  for (const slider of all("input[data-of]")) {
    slider.setAttribute("aria-label", `${slider.dataset.of}: ${names[0]} left, ${isError ? "error of " : ""}${names[1]} right`);
  }
}

// Photos, the worst first by the metric chosen, of the VAE that is judged.
function sort() {
  const judged = (Number(one("right").value) || Number(one("left").value) || 1) - 1;
  const metric = one("sort").selectedIndex;
  const sign = (one("sort").selectedOptions[0].dataset.better === "lower" ? -1 : 1) * (one("order").value === "best" ? -1 : 1);
  const value = (photo) => JSON.parse(photo.dataset.values)[judged]?.[metric] ?? Infinity * sign;
  const photos = all(".photo").sort((a, b) => sign * (value(a) - value(b)) || 0);
  one("photos").append(...photos);
}

function update() {
  if (one("left")) show();
  if (one("sort")) sort();
}

document.addEventListener("change", ({ target }) => {
  if (["left", "right", "sort", "order"].includes(target.id)) update();
});
document.addEventListener("click", ({ target }) => {
  if (target.id === "error") target.setAttribute("aria-pressed", String(target.getAttribute("aria-pressed") !== "true"));
  if (target.matches("button.pick") && one("right")) one("right").value = String(Number(target.dataset.vae) + 1);
  if (target.id === "error" || target.matches("button.pick")) update();
});
update();
