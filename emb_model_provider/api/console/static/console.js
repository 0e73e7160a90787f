"use strict";

document.documentElement.classList.add("js");

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const code = document.getElementById(button.dataset.copy);
  const announce = document.getElementById("announce");
  try {
    await navigator.clipboard.writeText(code.textContent);
    announce.textContent = announce.dataset.copied;
    button.classList.add("copied");
    setTimeout(() => {
      button.classList.remove("copied");
      announce.textContent = "";
    }, 1500);
  } catch {
    // Browsers offer the clipboard only over HTTPS and on this machine. The selected text can be copied by keyboard.
    getSelection().selectAllChildren(code);
  }
});

// After a restart of the service the session is over: the page that is loaded then is the sign-in page.
document.addEventListener("htmx:sse:error", (event) => {
  if (event.detail.status === 401) location.reload();
});
