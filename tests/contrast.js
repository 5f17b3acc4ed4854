// What tests/test_site.py asks of a page, in both schemes: text whose contrast with its ground is below 4.5, in Chromium's own colours.
addEventListener("load", () => {
  const still = document.createElement("style");
  still.textContent = "* { transition: none !important }";
  document.head.append(still);
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const read = (colour) => {  // red, green, blue, alpha of any colour that CSS can say
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
    return [[red, green, blue], alpha / 255];
  };
  const over = ([top, alpha], ground) => top.map((value, k) => alpha * value + (1 - alpha) * ground[k]);
  const light = (colour) => colour.map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, k) => sum + value * [0.2126, 0.7152, 0.0722][k], 0);
  const ratio = (one, two) => {
    const [low, high] = [light(one), light(two)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = (element) => element
    ? over(read(getComputedStyle(element).backgroundColor), ground(element.parentElement)) : [255, 255, 255];
  const seen = (element) => element ? getComputedStyle(element).opacity * seen(element.parentElement) : 1;
  const measure = () => {
    const found = {};
    let texts = 0;
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const element = walk.currentNode.parentElement;
      if (!walk.currentNode.data.trim() || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
      const style = getComputedStyle(element), below = ground(element);
      const [colour, alpha] = read(element.closest("svg") ? style.fill : style.color);
      const reached = ratio(over([colour, alpha * seen(element)], below), below);
      texts += 1;
      if (reached < 4.5) found[`${element.tagName} ${element.className}: ${walk.currentNode.data.trim().slice(0, 30)}`] = reached.toFixed(2);
    }
    return [texts, found];
  };
  const told = document.createElement("pre"), answer = {};
  for (const scheme of ["default", "slate"]) {
    document.body.dataset.mdColorScheme = scheme;
    answer[scheme] = [...measure(), getComputedStyle(document.body).backgroundColor];
  }
  told.id = "found";
  told.textContent = JSON.stringify(answer);
  document.body.append(told);
});
