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

// The sliders: each is a range input that lies over its pictures, so mouse, touch and keys are the browser's.
document.addEventListener("input", (event) => {
  if (event.target.matches(".frame input")) {
    event.target.closest(".frame").style.setProperty("--at", `${event.target.value}%`);
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

if (one("left")) {
  for (const id of ["left", "right"]) one(id).addEventListener("change", () => (show(), sort()));
  for (const id of ["sort", "order"]) one(id).addEventListener("change", sort);
  one("error").addEventListener("click", (event) => {
    const button = event.currentTarget;
    button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
    show();
  });
  for (const pick of all("button.pick")) {
    pick.addEventListener("click", () => {
      one("right").value = String(Number(pick.dataset.vae) + 1);
      show();
      sort();
    });
  }
  show();
  sort();
}
