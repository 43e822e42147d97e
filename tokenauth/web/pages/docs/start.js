// Where a token may be left out ("{}"), Swagger UI shows the closed lock of a login from the beginning.
const openLocks = () => ({
  statePlugins: {
    auth: {
      wrapSelectors: {
        isAuthorized: (original) => (state, ways) => original(ways?.filter((way) => way.size > 0)),
      },
    },
  },
});

// Addresses are relative, so that the page also works below a prefix of a reverse proxy.
const ui = SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#description",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "none",
  plugins: [openLocks],
  validatorUrl: null, // it would be asked at another host
  onComplete: () => ui.layoutActions.show(["operations-tag", "Token"], true), // the text at the top begins there
});
