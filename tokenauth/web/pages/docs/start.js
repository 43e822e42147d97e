// Addresses are relative, so that the page also works below a prefix of a reverse proxy.
const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#description",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "none",
  validatorUrl: null, // it would be asked at another host
  onComplete: () => ui.layoutActions.show(["operations-tag", "Token"], true), // the text at the top begins there
});
