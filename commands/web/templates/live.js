// Keeps a page live: on an event of the server it loads the page again and replaces its content.
// A page that is being typed into, or is hidden, stays as it is. Without this script the link
// "reload" does the same.
"use strict";
(() => {
  const button = document.getElementById("live");
  if (!button || !window.EventSource) return;
  const key = "qmqp-relay live";
  let source = null;
  let waits = false;

  const remembered = () => {
    try { return localStorage.getItem(key) !== "off"; } catch { return true; }
  };
  const remember = (on) => {
    try { localStorage.setItem(key, on ? "on" : "off"); } catch { /* it is forgotten */ }
  };
  const show = (text) => {
    button.textContent = text;
    button.setAttribute("aria-checked", String(source !== null));
  };
  const busy = () =>
    document.hidden || document.activeElement?.matches("main input, main select, main textarea");

  // Where the focus is, so that it is there again afterwards.
  const focusable = "a[href], button, summary, input, select, textarea";
  const place = (main) => [...main.querySelectorAll(focusable)].indexOf(document.activeElement);

  const replace = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const main = document.getElementById("main");
    const next = fresh.getElementById("main");
    if (!next || fresh.body.dataset.page !== document.body.dataset.page) return stop("Live: ended");
    const open = [...main.querySelectorAll("details")].map((one) => one.open);
    const focused = place(main);
    main.replaceChildren(...next.childNodes);
    main.querySelectorAll("details").forEach((one, n) => { if (n in open) one.open = open[n]; });
    if (focused >= 0) main.querySelectorAll(focusable)[focused]?.focus({ preventScroll: true });
    document.title = fresh.title;
    document.body.dataset.loads = Number(document.body.dataset.loads ?? 0) + 1;
  };

  const load = async () => {
    if (busy()) { waits = true; return; }
    waits = false;
    try {
      const answer = await fetch(location.href, { redirect: "error", cache: "no-store" });
      if (source !== null && answer.ok) replace(await answer.text());
    } catch { /* the next event tries again */ }
  };

  const stop = (text) => {
    source?.close();
    source = null;
    show(text);
  };
  const start = () => {
    source = new EventSource("/events");
    let first = true;  // the page has just been loaded
    source.onmessage = () => { if (first) first = false; else load(); };
    source.onopen = () => show("Live: on");
    source.onerror = () => show("Live: waiting");
    source.addEventListener("ended", () => location.reload());
    show("Live: on");
  };

  button.addEventListener("click", () => {
    if (source) stop("Live: off"); else start();
    remember(source !== null);
  });
  document.addEventListener("visibilitychange", () => { if (source && waits) load(); });
  document.addEventListener("focusout", () => setTimeout(() => { if (source && waits) load(); }));
  button.hidden = false;
  if (remembered()) start(); else show("Live: off");
})();
