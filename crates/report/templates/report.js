// A branch under the pointer, or chosen with the keyboard in the table, is lit in every chart.
// The page is complete without this.
const parts = [...document.querySelectorAll("[data-branch]")];
const readout = document.getElementById("readout");
let pinned = null;

function light(branch) {
  for (const part of parts) part.classList.toggle("lit", part.dataset.branch === branch);
  document.body.classList.toggle("lighting", branch !== null);
  const row = parts.find((part) => part.dataset.branch === branch && part.dataset.title);
  readout.hidden = !row;
  readout.textContent = row ? row.dataset.title : "";
}

for (const part of parts) {
  part.addEventListener("pointerenter", () => light(part.dataset.branch));
  part.addEventListener("pointerleave", () => light(pinned));
  part.addEventListener("click", () => {
    pinned = pinned === part.dataset.branch ? null : part.dataset.branch;
    light(pinned);
  });
  if (part.tagName === "TR") {
    part.tabIndex = 0;
    part.addEventListener("focus", () => light(part.dataset.branch));
    part.addEventListener("blur", () => light(pinned));
  }
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") light((pinned = null));
});
