// Times stand in UTC; here they are put into the reader's zone.
for (const element of document.querySelectorAll("[data-ms]")) {
  const time = new Date(Number(element.dataset.ms));
  const step = Number(element.dataset.step || 0);
  element.textContent = !step
    ? time.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" })
    : step < 60
      ? time.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" })
      : step < 86400
        ? time.toLocaleTimeString(undefined, { hour: "2-digit", minute: "2-digit" })
        : time.toLocaleDateString(undefined, { day: "numeric", month: "short" });
}
document.getElementById("zone").textContent =
  "Times are those of " + Intl.DateTimeFormat().resolvedOptions().timeZone + ".";
