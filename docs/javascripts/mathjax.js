// Formulas in $...$ and $$...$$, which pymdownx.arithmatex hands over as \(...\) and \[...\].
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
